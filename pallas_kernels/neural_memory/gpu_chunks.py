"""The Mosaic GPU kernel (sm_90) that differentiates all chunks of a one-layer memory at once.

The sweeps of `gpu_kernels` give the matrices M and S at a chunk's start, their cotangents dM and dS at its end, delta
and its cotangent. With these, chunks are independent:

    D = -(d out) delta^T,    dC = D o (q k^T)
    dq = A (d out) M^T + B (d out) S^T + (C o D) k
    dk = anchor (d delta) M^T - C_last delta dM^T - E_last delta dS^T + (C o D)^T q

The cotangents of the other coefficients are inner products of rows of q or k with the terms of dq and dk. Those of the
last slot also include inner products of the matrices with their cotangents, computed by the backward sweep.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.mosaic_gpu.parts import (
    CHUNK,
    along_rows,
    load_matrix,
    matrix,
    products,
    sum_columns,
    transposed,
)
from engrax.pallas_kernels.mosaic_gpu.pipeline import run_kernel
from engrax.pallas_kernels.neural_memory.gpu_kernels import (
    ANCHOR,
    LAST,
    LAST_WRITE,
    READ_MOMENTUM,
    READ_WEIGHTS,
    TABLE_ROWS,
    WRITE,
    MemorySizes,
    PackedTokens,
    sizes_of,
)


def chunk_gradients(tokens: PackedTokens, out_bar, again: dict, back: dict, *, interpret: bool = False) -> dict:
    """Returns the cotangents of the `PackedTokens`: "q_bar", "k_bar" `[B, T, H, K]` bfloat16, "write_bar", "table_bar".

    again, back: the results of `states` and `backward`. One program serves 64 of the K features of a chunk of one head.
    """
    plan = sizes_of(tokens)
    tiles_of_key, count = plan.key // 64, plan.chunks
    shape, lead = jax.ShapeDtypeStruct, (tiles_of_key, count, plan.batch, plan.heads)
    out_types = {
        "q_bar": plan.tokens(plan.key),
        "k_bar": plan.tokens(plan.key),
        "write_bar": shape((*lead, CHUNK, CHUNK), jnp.float32),
        "rows_bar": shape((*lead, LAST, CHUNK), jnp.float32),
    }
    inputs = {"q": tokens.q, "k": tokens.k, "write": tokens.write, "table": tokens.table}
    inputs |= {"out_bar": out_bar, "delta": again["delta"], "rest": again["rest"], "v_bar": back["v_bar"]}
    inputs |= {name: again[f"{name}_at"] for name in ("weights", "momentum")}
    inputs |= {f"{name}_bar": back[f"{name}_at"] for name in ("weights", "momentum")}
    wide = {name: matrix(64, plan.value) for name in inputs if name not in ("q", "k", "write", "table")}
    scratch = {
        **wide,
        "q": matrix(CHUNK, 64),
        "k": matrix(CHUNK, 64),
        "write": matrix(CHUNK, CHUNK, jnp.float32),
        "table": plgpu.SMEM((TABLE_ROWS, CHUNK), jnp.float32),
        "square": matrix(CHUNK, CHUNK),
        "arrived": plgpu.Barrier(num_arrivals=len(inputs)),
    }
    grid = (plan.batch, plan.heads, count * tiles_of_key)
    body = partial(_differentiate, plan)
    found = run_kernel("neural_memory_backward_tokens", body, out_types, scratch, grid, interpret, inputs)
    last = jnp.pad(back["matches"], [(0, 0)] * 3 + [(0, CHUNK - 3)])
    table_bar = jnp.concatenate([found["rows_bar"].sum(0), last[..., None, :]], axis=-2)
    tokens_bar = {"q_bar": found["q_bar"], "k_bar": found["k_bar"]}
    return tokens_bar | {"write_bar": found["write_bar"].sum(0), "table_bar": table_bar}


def _differentiate(plan: MemorySizes, inputs, outputs, scratch):
    batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
    tiles_of_key = plan.key // 64
    chunk, tile = lax.div(part, tiles_of_key), lax.rem(part, tiles_of_key)
    here, features = (batch, pl.ds(chunk * CHUNK, CHUNK), head), pl.ds(tile * 64, 64)
    places = {name: inputs[name].at[*here, :] for name in ("out_bar", "delta", "rest", "v_bar")}
    places |= {name: inputs[name].at[*here, features] for name in ("q", "k")}
    places |= {name: inputs[name].at[chunk, batch, head] for name in ("write", "table")}
    for name in ("weights", "momentum", "weights_bar", "momentum_bar"):
        places[name] = inputs[name].at[batch, head, chunk, features, :]
    for name, place in places.items():
        plgpu.copy_gmem_to_smem(place, scratch[name], scratch["arrived"])
    plgpu.barrier_wait(scratch["arrived"])
    program = (tile, chunk, batch, head)
    _scores_bar(scratch)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["write"], outputs["write_bar"].at[program])
    rows_bar = outputs["rows_bar"].at[program]
    found = {"q": _of_queries(scratch, rows_bar)}
    plgpu.commit_smem()  # keeps later work from being moved up, which would need too many registers
    found["k"] = _of_keys(scratch, rows_bar)
    plgpu.commit_smem()  # all threads' products have read q and k, whose buffers are free now
    for name, value in found.items():
        scratch[name][...] = value
    plgpu.commit_smem()
    for name in found:
        plgpu.copy_smem_to_gmem(scratch[name], outputs[f"{name}_bar"].at[*here, features])
    plgpu.wait_smem_to_gmem(0)


def _scores_bar(scratch):
    """Stores minus the cotangent of (q k^T), rounded, in a square buffer, and the cotangent of C over C."""
    matches, scores = products(
        (scratch["out_bar"], transposed(scratch["delta"])), (scratch["q"], transposed(scratch["k"]))
    )
    scratch["square"][...] = (matches * load_matrix(scratch["write"])).astype(jnp.bfloat16)
    scratch["write"][...] = -matches * scores


def _of_queries(scratch, rows_bar):
    """Returns the cotangent of q; stores those of A and B."""
    by_weights, by_momentum, local = products(
        (scratch["out_bar"], transposed(scratch["weights"])),
        (scratch["out_bar"], transposed(scratch["momentum"])),
        (scratch["square"], scratch["k"]),
    )
    q, table, total = load_matrix(scratch["q"]), scratch["table"], -local
    for row, part in ((READ_WEIGHTS, by_weights), (READ_MOMENTUM, by_momentum)):
        rows_bar[row] = sum_columns(q * part)
        total = total + part * along_rows(table.at[row])
    return total.astype(jnp.bfloat16)


def _of_keys(scratch, rows_bar):
    """Returns the cotangent of k; stores those of the anchor's scale and of C and E of the last slot."""
    *parts, total = products(
        (scratch["v_bar"], transposed(scratch["weights"])),
        # The gradients of C and E are sums with cancellation, so they need delta in more than bfloat16.
        [(scratch[name], transposed(scratch["weights_bar"])) for name in ("delta", "rest")],
        [(scratch[name], transposed(scratch["momentum_bar"])) for name in ("delta", "rest")],
        (transposed(scratch["square"]), scratch["q"]),
    )
    k, table = load_matrix(scratch["k"]), scratch["table"]
    for row, part in zip((ANCHOR, WRITE, LAST_WRITE), parts):
        rows_bar[row] = -sum_columns(k * part)
        total = total + part * along_rows(table.at[row])
    return (-total).astype(jnp.bfloat16)
