"""Low-rank adaptation of projections (LoRA, arXiv 2106.09685): y = x W + (alpha / rank) (x A) B, with B zero at first.

Adapters are attached to projections by name, in any mixer or MLP. W keeps its name in the parameter tree, so parameters
of the unadapted model load into the adapted one. `frozen` parameters are marked; the optimizer does not change them.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engrax.errors import UserError
from engrax.layers.common.modules import Projection
from engrax.registry import did_you_mean


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Settings of the adapters."""

    rank: int = 0  # columns of A; 0 = no adapters
    alpha: float = 16.0  # the product A B is scaled by alpha / rank
    targets: tuple[str, ...] = ("q", "v")  # names of the adapted projections: q, k, v, out, gate, up, down, ...

    def __post_init__(self):
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank} must not be negative (0 = no adapters).")
        if self.rank and not self.targets:
            raise UserError("lora.targets is empty; name the projections to adapt (q, v, ...), or set lora.rank 0.")


class LoraLinear(Projection):
    """A projection with an adapter: x [..., in] -> y [..., out]."""

    def __init__(self, base: nnx.Linear, config: LoraConfig, *, rngs: nnx.Rngs):
        super().__init__(base.in_features, base.out_features, use_bias=base.use_bias, rngs=rngs)
        self.kernel, self.bias, self.wide = base.kernel, base.bias, getattr(base, "wide", False)
        self.scale = config.alpha / config.rank
        first, last = base.kernel.get_metadata().get("axes", (None, None))
        init = jax.nn.initializers.normal(base.in_features**-0.5)
        self.lora_a = nnx.Param(
            init(rngs.params(), (base.in_features, config.rank)), axes=(first, "rank"), role="matrix"
        )
        self.lora_b = nnx.Param(jnp.zeros((config.rank, base.out_features)), axes=("rank", last), role="matrix")

    def __call__(self, inputs: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = super().__call__(inputs)
        down = inputs.astype(y.dtype) @ self.lora_a[...].astype(y.dtype)
        return y + self.scale * (down @ self.lora_b[...].astype(y.dtype))

    def merged_kernel(self) -> Float[Array, "*L I O"]:
        """W + (alpha / rank) A B, also of layers stacked along leading axes; in W's dtype."""
        a, b = self.lora_a[...], self.lora_b[...]
        product = jnp.einsum("...IR,...RO->...IO", a, b, precision="highest")
        return (self.kernel[...] + self.scale * product).astype(self.kernel[...].dtype)


def attach(module: nnx.Module, config: LoraConfig, *, rngs: nnx.Rngs) -> frozenset[str]:
    """Replaces every projection below `module` whose name is in `config.targets` by an adapted one.

    Returns the names of all possible targets. Raises UserError for a target that is not possible: its kernel is not a
    matrix (every memory has its own), or its class lists it in `read_directly`, the projections whose kernels are read
    without a call.
    """
    names = set()
    for parent, name, child in list(_linears(module)) if config.rank else ():
        adaptable = child.kernel.ndim == 2 and name not in getattr(parent, "read_directly", ())
        if adaptable:
            names.add(name)
        if name in config.targets:
            if not adaptable:
                raise UserError(
                    f"lora.targets names {name!r}, but this projection of {type(parent).__name__} cannot have an "
                    "adapter: it is no matrix that the module calls. Leave it out."
                )
            setattr(parent, name, LoraLinear(child, config, rngs=rngs))
    return frozenset(names)


def check_targets(names: Iterable[str], config: LoraConfig) -> None:
    """Raises UserError if a target is not among the names that `attach` returned."""
    names = set(names)
    for target in config.targets if config.rank else ():
        if target not in names:
            raise UserError(
                f"lora.targets names {target!r}, but no projection of the model has this name"
                f"{did_you_mean(target, names)} (known: {', '.join(sorted(names))})."
            )


def merged_params(module: nnx.Module) -> dict[tuple, Array]:
    """{path: value} of all parameters below `module` without the adapters, which are added to their kernels."""
    found = {path: value[...] for path, value in nnx.iter_graph(module) if isinstance(value, nnx.Param)}
    for path, layer in nnx.iter_graph(module):
        if isinstance(layer, LoraLinear):
            found[(*path, "kernel")] = layer.merged_kernel()
            del found[(*path, "lora_a")], found[(*path, "lora_b")]
    return found


def adapter_flops(module: nnx.Module) -> int:
    """Forward FLOPs per token of the adapters below `module`: a multiply-add for each of their entries."""
    layers = [layer for _, layer in nnx.iter_graph(module) if isinstance(layer, LoraLinear)]
    return 2 * sum(layer.lora_a.size + layer.lora_b.size for layer in layers)


def freeze(module: nnx.Module, *, skip: tuple[str, ...] = ()) -> None:
    """Marks every parameter below `module` as not trained, except adapters, the parts named in `skip`, and those that a
    module's class lists in `added`, the parts that it puts around pretrained ones."""
    added = [(*path, n) for path, part in nnx.iter_graph(module) for n in getattr(type(part), "added", ())]
    for path, value in nnx.iter_graph(module):
        trained = path[:1] in [(n,) for n in skip] or any(path[: len(part)] == part for part in added)
        if isinstance(value, nnx.Param) and not trained and not str(path[-1]).startswith("lora_"):
            value.set_metadata(frozen=True)


def is_frozen(leaf: Any) -> bool:
    """Whether it is a variable that `freeze` has marked."""
    return isinstance(leaf, nnx.Variable) and bool(leaf.get_metadata().get("frozen", False))


def _linears(module: nnx.Module) -> Iterator[tuple[nnx.Module, str, nnx.Linear]]:
    """(parent, name, projection) of every linear map below `module`."""
    for _, parent in nnx.iter_graph(module):
        if isinstance(parent, nnx.Module):
            yield from ((parent, name, child) for name, child in vars(parent).items() if isinstance(child, nnx.Linear))
