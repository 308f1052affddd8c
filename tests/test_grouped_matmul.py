"""The grouped product: every form against the definition, jax's kernels interpreted, the choice, what tiles cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.models.remat import REMAT
from engrax.pallas_kernels import devices, dispatch, grouped_matmul
from engrax.pallas_kernels.grouped_matmul import cost, grouping, xla
from engrax.pallas_kernels.grouped_matmul.grouping import GroupedInputs, GroupedShapes
from engrax.tests.mom_projection import gpu_flops

needs_kernels = pytest.mark.skipif(
    jax.__version_info__[:3] < dispatch.KERNELS_NEED_JAX, reason="there are no kernels on this jax"
)
OP = "grouped_matmul"
FINE = GroupedShapes(8, 100, 64, 5, 1024, 2048, np.dtype(jnp.bfloat16))  # a mixture of mom_340m, on one of 32 devices


def make_problem(batch=2, blocks=5, rows=4, owners=4, features=6, outputs=10, dtype=jnp.float64):
    """x, kernels, owners in no order of which the last but one has nothing, and the cotangent of the products."""
    rng = np.random.default_rng(0)
    shapes = (batch, blocks, rows, features), (owners, features, outputs), (batch, blocks, rows, outputs)
    x, kernels, bar = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    owner = rng.choice([n for n in range(owners) if n != owners - 2], (batch, blocks))
    x = x.at[:, -1, -1:].set(0)  # free rows
    return x, kernels, jnp.asarray(owner, jnp.int32), bar


def pull(x, kernels, owner, bar, implementation):
    """Products and the cotangents of x and kernels."""

    @jax.jit
    def run(x, kernels, bar):
        y, back = jax.vjp(lambda *ab: grouped_matmul(*ab, owner, implementation=implementation), x, kernels)
        return y, *back(bar)

    return run(x, kernels, bar)


def by_tile(x, kernels, owner, bar):
    """The same in the form for other devices than a CPU."""

    def run(x, kernels, bar):
        inputs = GroupedInputs(x, kernels, owner)
        bars = xla.by_tile_cotangents(inputs, bar)
        return xla.by_tile(inputs), bars.x, bars.kernels

    return jax.jit(run)(x, kernels, bar)


@pytest.mark.parametrize("rows, tile", [(4, None), pytest.param(1, None, marks=pytest.mark.deep), (4, 3)])
def test_every_form_is_the_definition(rows, tile, x64, monkeypatch):
    problem = make_problem(rows=rows)
    if tile is not None:  # blocks of a tile: more than an owner's run, which leaves free places
        monkeypatch.setattr(xla, "tile_blocks", lambda *sizes: tile)
    wanted = pull(*problem, "reference")
    assert not wanted[2][-2].any() and wanted[2][-1].any()  # the derivative by a kernel that no block has is zero
    for found in (pull(*problem, "xla"), by_tile(*problem)):
        for got, want in zip(found, wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_saved_products_are_not_computed_again():
    x, kernels, owner, _ = make_problem(dtype=jnp.float32)

    def loss(kernels):
        return jnp.sum(jnp.sin(grouped_matmul(jnp.sin(x), kernels, owner)))

    products = {
        name: str(jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=REMAT[name])))(kernels)).count("scan[")
        for name in ("dots", "full")
    }
    assert products == {"dots": 2, "full": 3}  # loops of the CPU's form: forward, again, backward


def errors(found, exact):
    return [np.sqrt(np.mean((np.asarray(a, np.float64) - b) ** 2)) for a, b in zip(found, exact, strict=True)]


KERNELS = [
    pytest.param("pallas_tpu", jnp.bfloat16, dict(rows=16, features=32, outputs=48), marks=pytest.mark.deep),
    pytest.param("pallas_tpu", jnp.float32, dict(rows=16, features=640, outputs=4), marks=pytest.mark.long),
    pytest.param("pallas_gpu", jnp.bfloat16, dict(rows=64, features=64, outputs=128), marks=pytest.mark.deep),
]


@needs_kernels
@pytest.mark.parametrize("name, dtype, sizes", KERNELS)
def test_kernels_err_as_little_as_xla(name, dtype, sizes, monkeypatch):
    monkeypatch.setattr(grouping, "TILES", 1)  # tiles of several blocks although there are few rows
    problem = make_problem(blocks=4, dtype=dtype, **sizes)
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) if a.dtype == dtype else a for a in problem]
        exact = [np.asarray(a) for a in pull(*wide, "reference")]
    with dispatch.interpreted_kernels():
        found = pull(*problem, name)
    for error, xla_error in zip(errors(found, exact), errors(by_tile(*problem), exact), strict=True):
        assert error <= 1.5 * xla_error
    assert [a.dtype for a in found] == [dtype] * 3


@needs_kernels
@pytest.mark.parametrize(
    "device, change, by, reason",
    [
        ("h200", {}, "pallas_gpu", None),
        ("h200", dict(dtype=np.dtype(np.float32)), "xla", "takes bfloat16, not float32"),
        ("h200", dict(rows=1), "xla", "blocks of 64 rows, not 1"),
        ("h200", dict(outputs=100), "xla", "multiples of 64 columns, not 1024 and 100"),
        ("h200", dict(owners=65), "xla", "at most 64 owners, not 65"),
        ("v5e", {}, "pallas_tpu", None),
        ("v5e", dict(dtype=np.dtype(np.float32), outputs=4), "pallas_tpu", None),
        ("v5e", dict(dtype=np.dtype(np.float16)), "xla", "takes float32 or bfloat16, not float16"),
        ("v5e", dict(rows=8), "xla", "a multiple of 16 rows, not 8"),
        ("v5e", dict(features=1100), "xla", "up to 1024 columns or multiples of 128, not 1100 and 2048"),
        ("b200", {}, "xla", "this is NVIDIA B200"),
        ("cpu", {}, "xla", "this is cpu"),
    ],
)
def test_the_choice_by_device_and_its_reasons(device, change, by, reason):
    served = dispatch.explain(dispatch.Call(OP, FINE._replace(**change), None), devices.NAMED[device])
    assert served.by == by
    kernel = "pallas_tpu" if device.startswith("v") else "pallas_gpu"
    assert (kernel not in served.others) if reason is None else reason in served.others[kernel]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=np.ones((2, 3, 4))), r"x has shape \(2, 3, 4\), wanted \[B, M, C, D\]"),
        (dict(x=np.ones((2, 0, 4, 6))), "x has shape .* every axis at least 1"),
        (dict(x=np.ones((2, 5, 4, 6), int)), "x has dtype int64, wanted a floating-point dtype"),
        (dict(kernels=np.ones((4, 5, 10))), r"kernels has shape \(4, 5, 10\), wanted \[N, D, E\] = \(4, 6, 10\)"),
        (dict(owner=np.ones((2, 4), int)), r"owner has shape \(2, 4\), wanted \[B, M\] = \(2, 5\)"),
        (dict(owner=np.ones((2, 5))), "owner has dtype float64, wanted an integer dtype"),
        (dict(implementation="megablox"), "unknown implementation 'megablox'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(x=np.ones((2, 5, 4, 6)), kernels=np.ones((4, 6, 10)), owner=np.zeros((2, 5), int))
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(arguments | change))


def test_tiles_leave_few_rows_free_and_do_not_grow_in_number():
    """Of mom_340m's layout: 3 copies of 2,048 tokens per row, at every batch size that a device may have."""
    for batch in (1, 8, 256):
        blocks = batch * FINE.blocks
        tile = grouping.tile_blocks(blocks, FINE.rows, FINE.owners)
        tiles = grouping.tile_count(blocks, FINE.owners, tile)
        assert tiles <= (grouping.TILES + 2) * FINE.owners
        multiplied = cost.flops(batch=1, seq=tiles * tile * FINE.rows, owners=5, features=1024, outputs=2048)
        needed = cost.flops(batch=batch, seq=3 * 2048, owners=5, features=1024, outputs=2048)
        assert sum(multiplied) <= 1.15 * sum(needed)


@needs_kernels
def test_the_flops_of_a_compiled_program_are_those_of_its_products():
    a, b = jnp.ones((24, 40)), jnp.ones((40, 56))

    def count(run):
        return gpu_flops(jax.jit(run).lower(a, b).compile().as_text())

    assert count(lambda a, b: jnp.sin(a) @ b) == 2 * 24 * 40 * 56
    with pytest.raises(ValueError, match="FLOPs that are not known: .*while"):
        count(lambda a, b: jax.lax.map(lambda row: row @ b, a))
