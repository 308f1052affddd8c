"""The neural memory's Mosaic GPU kernels without a GPU, as in test_kernels_gpu.

The operation's XLA form computes in float32. The kernel is compared with that form's program with every operand of a
product rounded to bfloat16.
"""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels.dispatch import interpreted_kernels
from engrax.pallas_kernels.neural_memory.types import MemoryShapes
from engrax.tests import neural_memory_problems, op_problems
from engrax.tests.gpu_kernels import abstract_h200, compare_errors, needs_kernels

pytestmark = needs_kernels


def memory_problem(keys="random", gates="exact", **case):
    """Returns (arrays as a call with bfloat16 tokens gets them, static): keys and queries of unit norm, a stable lr.

    gates: "exact" (0 and 1 among them: every chunk forgets everything) or "lasting" (what is written stays for chunks).
    """
    defaults = dict(depth=1, batch=1, heads=1, key=64, value=64, chunk=64, length=128)
    with jax.enable_x64(True):
        arrays, static = neural_memory_problems.make_problem(**{**defaults, **case})
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), arrays)
    static.pop("segment_ids", None)  # see `packed_rows`
    if gates == "lasting":
        arrays |= dict(forget=arrays["forget"] * 0.01, momentum=0.7 * arrays["momentum"], lr=arrays["lr"] * 0.2)
    if keys == "identical":
        arrays["k"] = np.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
    for name in "qk":
        arrays[name] = arrays[name] / np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    arrays["lr"] = arrays["lr"] * (20 / 64)
    return arrays | {name: jnp.asarray(arrays[name], jnp.bfloat16) for name in "qkv"}, static


def packed_rows(starts, batch, length, phase=0):
    """Returns segment ids `[B, T]`: several segments, filler and padding in the first row, one segment in the second,
    padding in others.

    starts: the segments of the first row, which is at `phase`, begin at "chunks" or "anywhere", two in one chunk.
    """
    ids, end = np.full((batch, length), -1, np.int32), length - 6
    places = {
        "chunks": ((0, 50), (64 - phase, 128 - phase), (128 - phase, end)),
        "anywhere": ((0, 20), (25, 41), (41, 60), (60, min(end, 99)), (99, end)),
    }[starts]
    ids[0, :end] = -2
    for segment, (first, last) in enumerate(places):
        ids[0, first : min(last, end)] = segment
    ids[1:2] = 0
    return ids


def memory_program(static, **options):
    """Returns the function of the arrays and the segment ids, or None, that gives ((out, final matrices), gradients of
    a random weighting of both).

    The weights are numbers of bfloat16, so that no precision of the output rounds them.
    """

    def both(arrays, segment_ids):
        def run(arrays):
            out, state = neural_memory_problems.call(arrays, static, segment_ids=segment_ids, **options)
            return out, state[:3]

        result, pull = jax.vjp(run, arrays)
        rng = np.random.default_rng(1)
        weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16).astype(x.dtype), result)
        return result, pull(weights)[0]

    return both


def with_bfloat16_products(function):
    """Returns the function with the operands of products rounded to bfloat16, but for those of highest precision."""
    from jax.extend import core

    def evaluate(jaxpr, consts, args):
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(x):
            return x.val if isinstance(x, core.Literal) else values[x]

        for equation in jaxpr.eqns:
            inputs, params = [read(x) for x in equation.invars], equation.params
            inner = params["branches"][-1] if "branches" in params else params.get("jaxpr", params.get("call_jaxpr"))
            if inner is not None:  # of the branches by platform any does
                inputs = inputs[1:] if "branches" in params else inputs
                outputs = evaluate(inner.jaxpr, inner.consts, inputs)
            else:
                if equation.primitive.name == "dot_general" and params["precision"] is None:
                    inputs = [jax.lax.reduce_precision(x, 8, 7) for x in inputs]
                outputs = equation.primitive.bind(*inputs, **params)
                outputs = outputs if equation.primitive.multiple_results else [outputs]
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def run(*args):
        with jax.disable_jit():  # loops over chunks become straight-line code
            closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run


@pytest.mark.parametrize(
    "case, options",
    [
        pytest.param(dict(length=128), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=80, rows="phased"), dict(gradient_at="decayed"), marks=pytest.mark.deep),
        pytest.param(dict(length=128, keys="identical"), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=64, key=128), dict(gradient_at="decayed"), marks=pytest.mark.long),
        pytest.param(
            dict(length=150, heads=2, batch=2, value=128),
            dict(gradient_at="decayed", save_every=2),
            marks=pytest.mark.long,
        ),
        pytest.param(dict(length=192, key=128, value=128), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=1000), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=66, batch=2, rows="phased"), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=330, batch=2, rows="phased"), dict(save_every=3), marks=pytest.mark.long),
        pytest.param(dict(length=192, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=1000, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(key=128, value=128, length=150, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=128, length=150, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=64, length=256, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=64, length=128), dict(gradient_at="decayed"), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=128, length=192, keys="identical"), dict(), marks=pytest.mark.long),
        pytest.param(
            dict(depth=2, hidden=128, length=330, batch=2, heads=2, rows="phased", gates="lasting"),
            dict(gradient_at="decayed", save_every=3),
            marks=pytest.mark.long,
        ),
        pytest.param(dict(depth=2, hidden=64, length=66, batch=2, rows="phased"), dict(), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=64, length=1000, gates="lasting"), dict(), marks=pytest.mark.long),
        *(
            pytest.param(
                dict(depth=2, hidden=64, length=192, gates="lasting"), dict(activation=name), marks=pytest.mark.long
            )
            for name in ("silu", "relu", "tanh")
        ),
    ],
)
def test_the_memory_kernel_is_as_accurate_as_the_xla_form_in_bfloat16_and_free_of_races(case, options):
    check_memory_kernel(*memory_problem(**case), [None], **options)


PACKED = [
    pytest.param(dict(length=128, batch=2), dict(), id="one layer"),
    pytest.param(
        dict(length=134, batch=2, rows="phased", depth=2, hidden=64), dict(), id="two layers", marks=pytest.mark.deep
    ),
    *(
        pytest.param(case, options, marks=pytest.mark.long)
        for case, options in (
            (dict(length=330, batch=3, heads=2, rows="phased"), dict(gradient_at="decayed", save_every=3)),
            (dict(length=150, batch=3, key=128, value=128), dict(gradient_at="decayed")),
            (dict(length=330, batch=3, heads=2, depth=2, hidden=128), dict(gradient_at="decayed")),
            (dict(length=192, batch=2, depth=2, hidden=64, gates="exact"), dict(activation="silu")),
            (dict(length=192, batch=2, gates="exact"), dict()),
        )
    ),
]


@pytest.mark.parametrize("case, options", PACKED)
def test_the_memory_kernel_is_as_accurate_in_packed_rows(case, options):
    arrays, static = memory_problem(**{"gates": "lasting", "segments": True, **case})
    sizes = (*arrays["lr"].shape[:2], int(static["phase"][0]))
    check_memory_kernel(arrays, static, [packed_rows(starts, *sizes) for starts in ("chunks", "anywhere")], **options)


def check_memory_kernel(arrays, static, segment_ids, **options):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kernel = op_problems.compiled(memory_program(static, implementation="pallas_gpu", **options))
    xla = op_problems.compiled(with_bfloat16_products(memory_program(static, implementation="xla", **options)))
    reference = op_problems.compiled(memory_program(static, implementation="reference", **options))
    for ids in segment_ids:
        params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
        with interpreted_kernels(), plgpu.force_gpu_interpret_mode(params):
            found = kernel(arrays, ids)
        other = xla(arrays, ids)
        assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(other)]
        with jax.enable_x64(True):
            doubles = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
            wanted = jax.tree.map(np.asarray, reference(doubles, ids))
        compare_errors(*(op_problems.relative_rms(got, wanted) for got in (found, other)))


@pytest.mark.parametrize("segments", [False, pytest.param(True, marks=pytest.mark.deep)])
@pytest.mark.parametrize(
    "depth, hidden",
    [(1, 6), pytest.param(2, 64, marks=pytest.mark.deep), pytest.param(2, 128, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("devices, implementation", [pytest.param(1, "pallas_gpu", marks=pytest.mark.long), (8, None)])
def test_an_h200_gets_the_memory_kernels_and_no_loop(devices, implementation, depth, hidden, segments):
    arrays, static = memory_problem(batch=8, heads=2, depth=depth, hidden=hidden, segments=segments)
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    ids = jax.ShapeDtypeStruct((8, 128), jnp.int32) if segments else None

    def loss(arrays, ids):
        out, final = neural_memory_problems.call(arrays, static, segment_ids=ids, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2) + sum(jnp.sum(x**2) for x in jax.tree.leaves(final[:3]))

    with abstract_h200(*(((2, 2, 2), ("data", "fsdp", "tensor")) if devices == 8 else ())):
        text = jax.jit(jax.grad(loss)).trace(specs, ids).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(mosaic_gpu\w*)\((.*)", text)
    parts = ("forward", "backward_states", "backward_carry", "backward_tokens" if depth == 1 else "backward_reads")
    visits = [1, 2] if segments else [1]  # of every chunk: see `gpu_scan`
    assert len(calls) == len(visits) * len(parts) and len(calls) == text.count("custom_call @mosaic")
    found = re.findall(r'"?(neural_memory_(?:[a-z]+_)*[a-z]+?)_mosaic_gpu', text)
    assert set(found) == {f"neural_memory_{part}" for part in parts}
    assert "stablehlo.while" not in text
    rows, heads = (2, 1) if devices == 8 else (8, 2)
    tokens = [f"tensor<{rows}x{128 * n}x{heads}x64xbf16>" for n in visits]
    assert [sum(x in rest for _, rest in calls) for x in tokens] == [len(parts)] * len(visits)


def test_what_the_memory_kernel_cannot_serve_is_said():
    unsupported = importlib.import_module("engrax.pallas_kernels.neural_memory.gpu").unsupported
    single, half = np.dtype(np.float32), np.dtype(jnp.bfloat16)
    fine = MemoryShapes(single, ((64, 128),), 64, 1, half, 2, 4, 2, True, False)
    assert all(unsupported(fine._replace(segments=packed)) is None for packed in (False, True))
    assert unsupported(fine._replace(aligned=False, blocks=3)) is None
    assert all(unsupported(fine._replace(layers=((64, size), (size, 64)))) is None for size in (64, 128))
    for change, word in (
        (dict(layers=((64, 64),) * 3), "1 or 2 layers, not 3"),
        (dict(layers=((64, 96), (96, 64))), "multiples of 64, not 96"),
        (dict(layers=((64, 192), (192, 64))), "305 KiB of shared memory for K = 64, 192 hidden"),
        (dict(layers=((64, 256), (256, 64))), "393 KiB"),
        (dict(layers=((128, 128), (128, 128))), "369 KiB"),
        (dict(layers=((128, 64), (64, 128))), "255 registers), not 128 and 128"),
        (dict(tokens=single), "bfloat16"),
        (dict(dtype=np.dtype(np.float64)), "float64"),
        (dict(layers=((32, 128),)), "not 32 and 128"),
        (dict(slots=16), "not blocks of 16"),
        (dict(aligned=False), "unknown phases from 66 tokens"),
        (dict(heads=70000), "65535"),
    ):
        assert word in unsupported(fine._replace(**change))
    arrays, static = memory_problem()
    arrays["v"] = arrays["v"].astype(jnp.float32)
    with interpreted_kernels(), pytest.raises(NotImplementedError, match="takes bfloat16 q, k and v"):
        neural_memory_problems.call(arrays, static, implementation="pallas_gpu")
