"""One gate per channel on GPUs of compute capability 9.0: the stateless part, for all chunks at once.

Each decay is the exponential of a sum of gates over a window of tokens. The matrix unit computes these sums: a 0/1
matrix [C, C] times the gates [C, K], where each gate is the sum of two bfloat16 numbers (16 bits). All gates are <= 0,
so nothing cancels and nothing overflows. The scores

    P_ij = sum_c q_ic k_jc exp(sum of the gates of channel c after j, up to i)

are computed by halving, as in `decay.channel_scores`. Between the right and the left half of a block of 2^(level + 1)
tokens, the decay is a factor from the middle to i times a factor from j to the middle. Let x be q times its factor in
right halves and k times its factor in left halves. Then x x^T holds the scores of all pairs that a level separates. The
gradients of q in right halves and of k in left halves are the factor times M x, where M is the symmetric matrix of the
scores' cotangents.

`prepare` computes the scores (and, for the delta rule, the inverse) and multiplies tokens by their decays to the ends
of the chunk. The walks of `channel_scan` carry the states. `token_gradients` differentiates. During the backward pass,
the states and their cotangents of every chunk are in memory as bfloat16: 4 K V bytes per chunk and head.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.mosaic_gpu.parts import (
    CHUNK,
    along_columns,
    along_rows,
    ladder,
    load_matrix,
    matrix,
    own,
    products,
    sum_columns,
    transposed,
)
from engrax.pallas_kernels.mosaic_gpu.pipeline import run_kernel
from engrax.pallas_kernels.mosaic_gpu.widths import sum_heads

LEVELS = CHUNK.bit_length() - 1
FEATURES = 64  # processed at once


class ChannelGates(NamedTuple):
    """The gates themselves, not their sums."""

    high: jax.Array  # [B, T, H, K] bfloat16
    low: jax.Array  # [B, T, H, K] bfloat16, the rounding error of high
    whole: jax.Array  # [B, H, N, K] float32, the decay of each chunk


def by_channel(decay: Decay | None) -> bool:
    """Returns whether there is one gate per channel."""
    return decay is not None and decay.hi.ndim == 4


def channel_gates(decay: Decay) -> ChannelGates:
    """Returns the gates `[B, T, H, K]` whose cumulative sums inside chunks of `CHUNK` tokens are the decay."""
    shape = decay.hi.shape
    hi, lo = (x.astype(jnp.float32).reshape(shape[0], -1, CHUNK, *shape[2:]) for x in decay)
    gates = (jnp.diff(hi, axis=2, prepend=0) + jnp.diff(lo, axis=2, prepend=0)).reshape(shape)
    high = lax.reduce_precision(gates, 8, 7)
    whole = jnp.exp(hi[:, :, -1] + lo[:, :, -1]).transpose(0, 2, 1, 3)
    return ChannelGates(high.astype(jnp.bfloat16), (gates - high).astype(jnp.bfloat16), whole)


def add_at_ends(by_token: jax.Array, ends: jax.Array) -> jax.Array:
    """Returns `[B, T, H, K]` with `[B, H, N, K]` added at the last token of every chunk."""
    shape = by_token.shape
    chunks = by_token.reshape(shape[0], -1, CHUNK, *shape[2:])
    return chunks.at[:, :, -1].add(ends.transpose(0, 2, 1, 3)).reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# Windows. Rows are tokens; columns are the tokens whose gates are added, or the tokens paired with the row's token.


def _places(scratch):
    """Returns the positions of the row's and the column's token in the chunk, `[C, C]` each.

    They are read from SMEM. If the compiler could compute them in advance, it would keep them in registers.
    """
    return along_rows(scratch["row"]), along_columns(scratch["column"])


def _is_right(scratch, level):
    return ((_places(scratch)[0] >> level) & 1) == 1


def _to_middle(scratch, level):
    """The gates between a token and its block's middle: up to the token in right halves, after it in left halves."""
    row, column = _places(scratch)
    right = (row >> level) & 1
    here = (row >> level) == (column >> level)
    return here & (((column <= row) & (right == 1)) | ((column > row) & (right == 0)))


def _separated(scratch, level):
    """The pairs with one token in the right and one in the left half of the same block."""
    row, column = _places(scratch)
    return ((row ^ column) >> level) == 1


def _since_start(scratch):
    row, column = _places(scratch)
    return column <= row


def _to_end(scratch):
    row, column = _places(scratch)
    return column > row


def _add_over(scratch, window, *level):
    """Sets the window of tokens that `_decay` adds over."""
    plgpu.commit_smem()  # all warps' products have read the buffers overwritten below
    scratch["window"][...] = jnp.where(window(scratch, *level), 1.0, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()


def _decay(scratch, features=slice(None)):
    """Returns the decay of every token over its window, `[C, 64]`, for these features."""
    (total,) = products([(scratch["window"], scratch[part].at[:, features]) for part in ("high", "low")])
    return jnp.exp(total)


def _number_tokens(inputs: dict, scratch: dict):
    """Adds the inputs and the scratch that `_places` and `_fetch` need."""
    inputs["token"] = jnp.arange(CHUNK, dtype=jnp.int32)
    scratch |= {name: plgpu.SMEM((CHUNK,), jnp.int32) for name in ("row", "column")}
    scratch["arrived"] = plgpu.Barrier(num_arrivals=len(inputs) + 1)


def _fetch(inputs, places: dict, scratch):
    """Copies the arrays in `places`, and the token numbers, into the scratch of the same names."""
    for name, place in (places | dict.fromkeys(("row", "column"), inputs["token"])).items():
        plgpu.copy_gmem_to_smem(place, scratch[name], scratch["arrived"])
    plgpu.barrier_wait(scratch["arrived"])


# ---------------------------------------------------------------------------------------------------------------------
# Scores and decayed tokens


class Prepared(NamedTuple):
    """The result of `prepare`; the last two are None if not requested."""

    q: jax.Array  # [B, T, HV, K] bfloat16, times the decay since the chunk's start
    k: jax.Array  # [B, T, HV, K] bfloat16, times the decay to the chunk's end
    scores: jax.Array  # [B, T, HV, C] bfloat16, P
    readers: Any  # [B, T, HV, K] bfloat16, k times the decay since the chunk's start
    inverse: Any  # [B, T, HV, C] float32, X of the delta rule


def prepare(
    name: str, q, k, gates: ChannelGates, *, beta=None, readers: bool = False, interpret: bool = False
) -> Prepared:
    """Computes what the walks need of q and k `[B, T, H, K]`. beta `[B, HV, N, C]` float32 requests the inverse."""
    batch, length, heads, features = gates.high.shape
    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    out_types = {name: shape((batch, length, heads, features)) for name in (("q", "k", "readers") if readers else "qk")}
    out_types["scores"] = shape((batch, length, heads, CHUNK))
    inputs = {"q": q, "k": k, "high": gates.high, "low": gates.low}
    scratch = {name: matrix(CHUNK, features) for name in inputs}
    scratch |= {"window": matrix(CHUNK, CHUNK), "operands": [matrix(CHUNK, features)]}
    if beta is not None:
        inputs["beta"] = beta
        out_types["inverse"] = jax.ShapeDtypeStruct((batch, length, heads, CHUNK), jnp.float32)
        scratch |= {"beta": plgpu.SMEM((CHUNK,), jnp.float32), "inverse": matrix(CHUNK, CHUNK, jnp.float32)}
        scratch["operands"] = [matrix(CHUNK, features) for _ in range(2)]
        scratch["parts"] = [[matrix(CHUNK, CHUNK) for _ in range(2)] for _ in range(2)]
    _number_tokens(inputs, scratch)
    body = partial(_prepare, heads // k.shape[2])
    found = run_kernel(name, body, out_types, scratch, (batch, heads, length // CHUNK), interpret, inputs)
    return Prepared(**dict.fromkeys(Prepared._fields) | found)


def _prepare(group: int, inputs, outputs, scratch):
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "part"))
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    places = {name: inputs[name].at[batch, tokens, head // group] for name in "qk"}
    places |= {name: inputs[name].at[batch, tokens, head] for name in ("high", "low")}
    if "beta" in inputs:
        places["beta"] = inputs["beta"].at[batch, head, chunk]
    _fetch(inputs, places, scratch)
    scores = _pair_scores(scratch)
    row, column = _places(scratch)
    scratch["window"][...] = jnp.where(row >= column, scores, 0.0).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["window"], outputs["scores"].at[batch, tokens, head])
    leaving = {"q": scratch["q"], "k": scratch["k"]}
    if "inverse" in outputs:
        row, column = _places(scratch)
        of_keys = jnp.where(row > column, load_matrix(scratch["inverse"]), 0.0)
        scratch["inverse"][...] = of_keys * along_rows(scratch["beta"])
        scratch["inverse"][...] = ladder(scratch["inverse"], *scratch["parts"])
        leaving["inverse"] = scratch["inverse"]
    if "readers" in outputs:
        leaving["readers"] = scratch["operands"][0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    _decay_tokens(scratch, leaving)
    plgpu.commit_smem()
    for name, buffer in leaving.items():
        plgpu.copy_smem_to_gmem(buffer, outputs[name].at[batch, tokens, head])
    plgpu.wait_smem_to_gmem(0)


def _tiles(ref):
    return [pl.ds(start, FEATURES) for start in range(0, ref.shape[1], FEATURES)]


def _pair_scores(scratch):
    """Returns the scores of the queries; stores those of the keys as queries in the inverse's buffer, if there is one.

    Entries above the diagonal are undefined, for keys also those on it; the caller masks them.
    """
    of_queries, *of_keys = scratch["operands"]

    def with_level(level, scores):
        _add_over(scratch, _to_middle, level)
        for tile in _tiles(scratch["k"]):
            factor = _decay(scratch, tile)
            q, k = (load_matrix(scratch[name].at[:, tile]) for name in "qk")
            of_queries[:, tile] = (jnp.where(_is_right(scratch, level), q, k) * factor).astype(jnp.bfloat16)
            for operand in of_keys:
                operand[:, tile] = (k * factor).astype(jnp.bfloat16)
        plgpu.commit_smem()
        for operand in of_keys:
            (found,) = products((operand, transposed(operand)))
            others = load_matrix(scratch["inverse"])
            scratch["inverse"][...] = jnp.where(_separated(scratch, level), found, others)
        (found,) = products((of_queries, transposed(of_queries)))
        return jnp.where(_separated(scratch, level), found, scores)

    (own,) = products((scratch["q"], transposed(scratch["k"])))  # correct on the diagonal
    return lax.fori_loop(0, LEVELS, with_level, own)


def _decay_tokens(scratch, leaving):
    """Multiplies q and k in place by their decays to the chunk's ends."""
    _add_over(scratch, _since_start)
    for tile in _tiles(scratch["k"]):
        factor = _decay(scratch, tile)
        for source, target in (("q", "q"), ("k", "readers")):
            if target in leaving:
                leaving[target][:, tile] = (load_matrix(scratch[source].at[:, tile]) * factor).astype(jnp.bfloat16)
    _add_over(scratch, _to_end)
    for tile in _tiles(scratch["k"]):
        scratch["k"][:, tile] = (load_matrix(scratch["k"].at[:, tile]) * _decay(scratch, tile)).astype(jnp.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients of tokens and gates


class Gradients(NamedTuple):
    """The result of `token_gradients`, per head of the gates."""

    rows: jax.Array  # [B, T, HG, K], of the reading rows, without their factor
    keys: jax.Array  # [B, T, HG, K], of the keys
    gates: jax.Array  # [B, T, HG, K] float32, of the cumulative gates


def token_gradients(
    name: str,
    rows,
    keys,
    values,
    gates: ChannelGates,
    out_bar,
    states,
    states_bar=None,
    matches=None,
    *,
    scale: float,
    factor=None,
    strict: bool = False,
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> Gradients:
    """Differentiates out_i = scale factor_i rows_i S_i by rows, keys and gates, where S_i is the state after token i.

    rows, keys `[B, T, H, K]`; values, out_bar `[B, T, HV, V]`; states `[B, HV, N, K, V]` bfloat16:
    the states before each chunk. states_bar: the cotangents of the states after each chunk. matches: from
    `channel_scan.ChannelStates`; None: the keys' writes into the state are ignored.
    factor `[B, HG, N, C]` float32 or None; the gradient of rows excludes it. strict: S_i excludes token i's write.
    The HG heads of the gates are a divisor of HV.
    """
    batch, length, gate_heads, features = gates.high.shape
    heads, outer, chunks = *values.shape[2:], length // CHUNK
    shape = (batch, length, heads, features)
    out_types = {name: jax.ShapeDtypeStruct(shape, out_dtype) for name in ("rows", "keys")}
    out_types["gates"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    inputs = {"q": rows, "k": keys, "high": gates.high, "low": gates.low}
    scratch = {name: matrix(CHUNK, FEATURES) for name in (*inputs, "window", "x", "match", "part")}
    scratch["gates"] = matrix(CHUNK, FEATURES, jnp.float32)
    inputs |= {"out_bar": out_bar, "values": values, "states": states}
    if states_bar is not None:
        inputs["states_bar"] = states_bar
        out_types["ends"] = jax.ShapeDtypeStruct((batch, heads, chunks, features), jnp.float32)
    if factor is not None:
        inputs["factor"] = factor
        scratch["factor"] = plgpu.SMEM((CHUNK,), jnp.float32)
    wide = ("out_bar", "values", "states", "states_bar")
    scratch |= {name: matrix(64, outer) for name in wide if name in inputs}
    _number_tokens(inputs, scratch)
    body = partial(_differentiate, heads, features // FEATURES, scale, strict)
    grid = (batch, heads, chunks * (features // FEATURES))
    found = run_kernel(name, body, out_types, scratch, grid, interpret, inputs)
    found = {name: sum_heads(x, gate_heads, axis=1 if name == "ends" else 2) for name, x in found.items()}
    if "ends" in found:
        found["gates"] = add_at_ends(found["gates"], found.pop("ends") + matches)
    return Gradients(**found)


def _differentiate(heads: int, tiles: int, scale: float, strict: bool, inputs, outputs, scratch):
    batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
    chunk, features = lax.div(part, tiles), pl.ds(lax.rem(part, tiles) * FEATURES, FEATURES)
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    places = {}
    for name in ("q", "k", "high", "low"):
        places[name] = inputs[name].at[batch, tokens, own(head, heads, inputs[name].shape[2]), features]
    places |= {name: inputs[name].at[batch, tokens, head, :] for name in ("out_bar", "values")}
    for name in ("states", "states_bar"):
        if name in inputs:
            places[name] = inputs[name].at[batch, head, chunk, features, :]
    if "factor" in inputs:
        places["factor"] = inputs["factor"].at[batch, own(head, heads, inputs["factor"].shape[1]), chunk]
    _fetch(inputs, places, scratch)
    here = (batch, tokens, head, features)
    of_rows, of_keys = _within_chunk(scratch, scale, strict)
    _send(_from_state(scratch, scale, of_rows), scratch["part"], outputs["rows"].at[here])
    if "states_bar" in inputs:
        of_keys, ends = _to_state(scratch, of_keys)
        outputs["ends"][batch, head, chunk, features] = ends
    _send(of_keys, scratch["match"], outputs["keys"].at[here])
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["gates"], outputs["gates"].at[here])
    plgpu.wait_smem_to_gmem(0)


def _send(x, buffer, target):
    """Stores a matrix. A 16-bit matrix goes through SMEM, each warp its own rows, since memory writes whole sectors."""
    if target.dtype == jnp.float32:
        target[...] = x
    else:
        buffer[...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, target)


def _rows(scratch):
    """Returns the rows multiplied by their factor."""
    rows = load_matrix(scratch["q"])
    return rows * along_rows(scratch["factor"]) if "factor" in scratch else rows


def _add_to_gates(scratch, x):
    """Adds to the gradient of the gates, which does not fit into the registers beside the others."""
    scratch["gates"][...] = load_matrix(scratch["gates"]) + x


def _within_chunk(scratch, scale: float, strict: bool):
    """Returns the gradients of rows and keys through the scores; stores that of the gates in its buffer."""
    row, column = _places(scratch)
    late, early = products(
        (scratch["out_bar"], transposed(scratch["values"])), (scratch["values"], transposed(scratch["out_bar"]))
    )
    scratch["match"][...] = jnp.where(row > column, late, early).astype(jnp.bfloat16)
    own = sum_columns(jnp.where((row == column) & (not strict), late, 0.0)) * scale
    own = lax.broadcast_in_dim(own, (CHUNK, FEATURES), [0])

    def with_level(level, bars):
        of_rows, of_keys = bars
        right = _is_right(scratch, level)
        _add_over(scratch, _to_middle, level)
        factor = _decay(scratch)
        scratch["x"][...] = (jnp.where(right, _rows(scratch), load_matrix(scratch["k"])) * factor).astype(jnp.bfloat16)
        match = jnp.where(_separated(scratch, level), load_matrix(scratch["match"]), 0.0)
        scratch["part"][...] = match.astype(jnp.bfloat16)
        plgpu.commit_smem()
        (found,) = products((scratch["part"], scratch["x"]))
        # The gates' gradient uses the rounded x, so that the contributions of a pair of tokens cancel exactly.
        found = found * scale
        by_gate = found * load_matrix(scratch["x"])
        _add_to_gates(scratch, jnp.where(right, by_gate, -by_gate))
        found = found * factor
        return of_rows + jnp.where(right, found, 0.0), of_keys + jnp.where(right, 0.0, found)

    scratch["gates"][...] = jnp.zeros_like(own)
    return lax.fori_loop(0, LEVELS, with_level, (own * load_matrix(scratch["k"]), own * _rows(scratch)))


def _from_state(scratch, scale: float, of_rows):
    """Adds the gradient through the rows' reads from the state before the chunk."""
    _add_over(scratch, _since_start)
    (read,) = products((scratch["out_bar"], transposed(scratch["states"])))
    read = read * _decay(scratch) * scale
    _add_to_gates(scratch, read * _rows(scratch))
    return of_rows + read


def _to_state(scratch, of_keys):
    """Adds the gradient through the keys' writes into the state after the chunk. Returns the gates' part."""
    _add_over(scratch, _to_end)
    factor = _decay(scratch)
    scratch["x"][...] = (load_matrix(scratch["k"]) * factor).astype(jnp.bfloat16)
    plgpu.commit_smem()
    (written,) = products((scratch["values"], transposed(scratch["states_bar"])))
    _add_to_gates(scratch, -written * load_matrix(scratch["x"]))
    ends = 0.0
    for tile in _tiles(scratch["states"]):
        (added,) = products((transposed(scratch["x"]), scratch["values"].at[:, tile]))
        ends = ends + sum_columns(load_matrix(scratch["states_bar"].at[:, tile]) * added)
    return of_keys + written * factor, ends
