"""Rematerialisation: what the forward pass of a model keeps for the backward pass, which recomputes the rest.

A setting is the name of a policy, for the repeats of the model's pattern: "dots". After it, kinds of layers may have
their own, mixers by their registered names and the MLPs as "mlp": "dots,titans=full,mlp=none". Then every layer is
recomputed by itself, so what lies between layers is kept.
"""

from collections.abc import Callable

import jax
from jax import checkpoint_policies as policies
from jax.ad_checkpoint import checkpoint_name

from engrax.errors import UserError
from engrax.models.contract import GATHERED, is_gathering
from engrax.pallas_kernels.grouped_matmul.api import PRODUCTS
from engrax.registry import did_you_mean

INPUT = "layer input"
HOST = dict(offload_src="device", offload_dst="pinned_host")

REMAT = {  # name -> values that the forward pass saves for the backward pass
    "none": None,  # all: fastest
    "dots": policies.save_from_both_policies(  # the results of projections
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCTS)
    ),
    "full": policies.nothing_saveable,  # only the input: smallest
    "offload_dots": policies.offload_dot_with_no_batch_dims(*HOST.values()),  # those of projections, in host memory
    "offload": policies.save_and_offload_only_these_names(  # only the input, in host memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=[INPUT], **HOST
    ),
}


def parse(setting: str, kinds: tuple[str, ...]) -> dict[str, str]:
    """{"": the policy of a pattern, kind of layer: its own}. Raises UserError for unknown policies and kinds."""
    default, *own = (part.strip() for part in setting.split(","))
    found = {"": default}
    for part in own:
        kind, _, name = part.partition("=")
        if kind not in kinds:
            raise UserError(f"remat {setting!r} names {kind!r}{did_you_mean(kind, kinds)} (here: {', '.join(kinds)}).")
        found[kind] = name
    for name in found.values():
        if name not in REMAT:
            raise UserError(f"unknown remat {name!r}{did_you_mean(name, REMAT)} (known: {', '.join(REMAT)}).")
    return found


def remat(name: str, f: Callable) -> Callable:
    """f(x, ...), whose forward pass under differentiation saves what the policy of this name says, and in no case a
    gathered parameter."""
    policy = REMAT[name]
    if policy is None and is_gathering():
        policy = policies.save_anything_except_these_names(GATHERED)
    if policy is None:
        return f

    def named(x, *args):
        return f(checkpoint_name(x, INPUT) if name == "offload" else x, *args)

    return jax.checkpoint(named, policy=policy, prevent_cse=False)
