"""What optimizers keep: bytes by the published formulae, on one device and sharded, and exact resumption."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.tests.optimizer_cases import PARAMS, SHAPES, SMALL, STEPS
from engrax.train import OPTIMIZERS, AdamWConfig, LionConfig
from engrax.train.checkpoint import Checkpoints
from engrax.train.experiment import CheckpointConfig
from engrax.train.optimizers.base import build


def state_bytes(config, params=PARAMS):
    """(bytes of arrays, of counters and other scalars)."""
    leaves = jax.tree.leaves(jax.eval_shape(build(config, 1, params).init, params))
    sizes = [[math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves if bool(x.ndim) == big] for big in (1, 0)]
    return tuple(map(sum, sizes))


def formulae(n):
    """Bytes of every optimizer's arrays for PARAMS, by the published formulae: sums over single matrices [i, o]."""
    matrix = [shape for _, shape, role, _ in SHAPES.values() if role == "matrix" and shape != (4, 2, 3)]
    total = sum(math.prod(shape) for _, shape, _, _ in SHAPES.values())
    inside = sum(map(math.prod, matrix))
    rest, stack = total - inside, [(math.prod(s[:-2]), *s[-2:]) for s in matrix]
    low = sum(b * (2 * min(i, o) + 2 * 2 * max(i, o)) for b, i, o in stack)  # rank min + 2 rank max, rank 2
    return {
        "adamw": 8 * total,
        "lion": 4 * total,
        "sgd": 4 * total,
        "spam": 8 * total,
        "schedule_free": 8 * total,
        "muon": 4 * inside + 8 * rest + 12,  # and the three coefficients of Newton-Schulz
        "galore": 4 * low + 8 * rest,
        "natural_galore": 4 * (low + sum(b * 4 * 2 * max(i, o) for b, i, o in stack)) + 8 * rest,
        "frugal": 8 * sum(b * int(0.5 * i) * o for b, i, o in stack) + 8 * rest,
        # Factored along two axes of at least 4; "memories" has [3, 4, 5], "qkv" [4, 14], "table" [7, 4].
        "adafactor": 4 * (2 * (6 + 10) + 2 * (9 + 5) + (4 + 14) + 3 * (4 + 5) + (7 + 4) + 24 + 24 + 10),
    }[n]


@pytest.mark.parametrize("name", SMALL)
def test_state_bytes_are_the_published_formula(name):
    arrays, scalars = state_bytes(SMALL[name])
    assert arrays == formulae(name) and scalars <= 24


def test_every_optimizer_is_tested():
    assert set(SMALL) == set(OPTIMIZERS)


def test_eight_bit_state_bytes():
    """1 + 12 / 128 per entry for each moment."""
    params = nnx.State({"w": nnx.Param(jnp.zeros((3, 100, 7)), axes=("layers", "embed", "mlp"), role="matrix"),
                        "b": nnx.Param(jnp.zeros((3, 127)), axes=("layers", "mlp"), role="bias")})  # fmt: skip
    for config, moments in ((AdamWConfig(moments="float8"), 2), (LionConfig(moments="float8"), 1)):
        arrays, _ = state_bytes(config, params)
        assert arrays == moments * (3 * (700 + 12 * 6) + 4 * 3 * 127)


EIGHT_BIT = {f"{n} in 8 bits": dataclasses.replace(SMALL[n], moments="float8") for n in ("adamw", "galore", "muon")}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "galore" else pytest.mark.deep) for n in (*SMALL, *EIGHT_BIT)]
)
def test_a_saved_state_goes_on_to_the_bit(name, tmp_path):
    """Through a checkpoint after 5 of 8 steps, in the middle of every interval."""
    config = (SMALL | EIGHT_BIT)[name]
    params = jax.tree.map(lambda x: jnp.tile(x, (1,) * (x.ndim - 1) + (6,)), PARAMS) if name in EIGHT_BIT else PARAMS
    grads = [jax.tree.map(lambda p, i=i: jnp.sin(p * (i + 1)), params) for i in range(STEPS)]
    if name in EIGHT_BIT:
        params, grads = (jax.tree.map(lambda x: x, t) for t in (params, grads))
        for tree in (params, *grads):
            tree["qkv"].set_metadata(widths=(24, 24, 36))
    tx = build(config, STEPS, params)
    update = jax.jit(tx.update)
    start, ends = {"params": params, "opt_state": tx.init(params)}, []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())

    def go(state, grads):
        for g in grads:
            updates, opt_state = update(g, state["opt_state"], state["params"])
            state = {"params": jax.tree.map(jnp.add, state["params"], updates), "opt_state": opt_state}
        return state

    half = go(start, grads[:5])
    checkpoints.save(5, half, {}, None)
    ends.append(go(half, grads[5:]))
    checkpoints.wait()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), half)
    ends.append(go(checkpoints.restore(like, 5)[0], grads[5:]))
    checkpoints.close()
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (half, ends[0]))))
