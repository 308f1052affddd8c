"""A model's compiled functions for reading and writing text, and `sample`.

Compiled functions belong to this module, not to a model. Their key is the model's structure, and parameters are
arguments. A second call, or a second model of the same structure, compiles nothing, for prompts of any length: prompts
are read in padded pieces of one length, and tokens are written by a loop whose number of steps is an argument. Memories
are donated, so they are updated in place.
"""

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import UserError
from engrax.models import sampling as draws
from engrax.models.contract import as_model, padding_last
from engrax.models.parameters import LAYERS, axes_of, cast
from engrax.models.sampling import Sampling, Traced
from engrax.models.tokens import is_one

PREFILL = 64  # tokens of the prompts read at a time
PIECE = 64  # most tokens written by one call


class Structure:
    """A model without its parameters: the key of its compiled functions."""

    def __init__(self, graphdef: nnx.GraphDef):
        self.graphdef = graphdef
        try:
            self._hash = hash(graphdef)
        except TypeError as error:
            raise UserError(
                f"the model holds a setting that cannot be hashed ({error}); make it a tuple or a frozen dataclass."
            ) from None

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Structure) and self._hash == other._hash and self.graphdef == other.graphdef

    def model(self, params: Any):
        """The model with these parameters."""
        return nnx.merge(self.graphdef, params)


class Flow(NamedTuple):
    """The carry of the writing loop."""

    logits: Float[Array, "B V"]
    memory: Any  # opened (`Model.open_memory`)
    alive: Bool[Array, " B"]  # rows that have not stopped
    position: Int[Array, " B"]  # tokens the row has read
    is_number: Bool[Array, ""]  # no logit of an active row was NaN


@partial(jax.jit, static_argnums=(0, 2))
def _start(structure: Structure, params: Any, rows: int) -> Any:
    return structure.model(params).init_memory(rows)


@partial(jax.jit, static_argnums=0, donate_argnums=(4, 5))
def _read(structure: Structure, params: Any, tokens_BT, ids_BT, logits_BV, memory) -> tuple[Array, Any]:
    """Logits after each row's last real token, and the memory. A row with only padding keeps its logits."""
    model = structure.model(params)
    with padding_last(ids_BT):
        out = model(tokens_BT, memory, segment_ids=ids_BT)
    count = jnp.sum(ids_BT >= 0, axis=1)
    last = jnp.take_along_axis(out.hidden, jnp.maximum(count - 1, 0)[:, None, None], axis=1)
    return jnp.where((count > 0)[:, None], model.logits(last)[:, 0], logits_BV), out.memory


@partial(jax.jit, static_argnums=0)
def _open(structure: Structure, params: Any, memory: Any) -> Any:
    return structure.model(params).open_memory(memory)


@partial(jax.jit, static_argnums=0)
def _close(structure: Structure, params: Any, memory: Any) -> Any:
    return structure.model(params).close_memory(memory)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _write(structure: Structure, params: Any, flow: Flow, settings: Traced, most) -> tuple[Flow, Array, Array]:
    """Draws up to `most` tokens and reads them: (flow, tokens [B, PIECE] with -1 where a row had stopped, how many)."""
    model = structure.model(params)
    rows = len(flow.alive)

    def step(padded: bool, carry):
        i, flow, written = carry
        token = jnp.where(flow.alive, draws.choose(flow.logits, flow.position, settings), -1)
        ids = jnp.where(flow.alive, 0, -1)[:, None].astype(jnp.int32) if padded else None
        out = model(jnp.maximum(token, 0)[:, None], flow.memory, segment_ids=ids)
        logits = model.logits(out.hidden)[:, 0]
        logits = jnp.where(flow.alive[:, None], logits, flow.logits) if padded else logits
        stopped = jnp.any(token[:, None] == settings.stop, axis=1)
        new = Flow(
            logits,
            out.memory,
            flow.alive & ~stopped,
            flow.position + flow.alive,
            ~jnp.any(jnp.isnan(logits) & flow.alive[:, None]),
        )
        return i + 1, new, jax.lax.dynamic_update_slice_in_dim(written, token[:, None], i, axis=1)

    def going(alive, carry):
        i, flow, _ = carry
        return (i < most) & flow.is_number & alive(flow.alive)

    flow = flow._replace(is_number=~jnp.any(jnp.isnan(flow.logits) & flow.alive[:, None]))
    carry = (jnp.int32(0), flow, jnp.full((rows, PIECE), -1, jnp.int32))
    # Without stopped rows there is no padding, and mixers need not check for it.
    carry = jax.lax.while_loop(partial(going, jnp.all), partial(step, False), carry)
    if rows > 1:
        carry = jax.lax.while_loop(partial(going, jnp.any), partial(step, True), carry)
    i, flow, written = carry
    return flow, written, i


@partial(jax.jit, static_argnums=0)
def _diagnose(structure: Structure, params: Any, logits_BV, memory) -> dict[str, Array]:
    """The mixers' diagnostics of reading each row's most likely token."""
    token = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)[:, None]
    return structure.model(params)(token, memory, collect=("*",)).collected


class Compiled:
    """A model's parameters with the compiled functions of its structure.

    dtype: the compute dtype, to which matrices are cast as in training; None leaves the parameters as they are.
    """

    def __init__(self, model: nnx.Module, dtype: Any = None):
        graphdef, params = nnx.split(as_model(model), nnx.Param)
        self.structure = Structure(graphdef)
        self.params = params if dtype is None else cast(params, dtype)
        leaves, tree = jax.tree.flatten(self.params)
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        self.vocabulary, self.logits_dtype, self.piece = _sizes(self.structure, tree, shapes)
        functions = (_start, _read, _open, _write, _close, _diagnose)
        self.start, self.read, self.open, self.write, self.close, self.diagnose = (
            partial(function, self.structure, self.params) for function in functions
        )

    def not_numbers(self, name: str) -> UserError:
        """The error for NaN logits: weights with NaN, else a full cache."""
        for path, variable in nnx.to_flat_state(self.params):
            value = np.asarray(variable.get_value())
            bad = (
                np.argwhere(~np.isfinite(value.astype(np.float32))) if jnp.issubdtype(value.dtype, jnp.floating) else ()
            )
            if len(bad):
                where = ".".join(map(str, path)) + (
                    f", layer {bad[0][0]}" if axes_of(variable)[:1] == (LAYERS,) else ""
                )
                return UserError(f"the weights of {name} hold values that are not numbers, in {where}.")
        return UserError(
            "the model's outputs are not numbers: prompt and sample exceed an attention cache's capacity or the "
            "learned positions (sample fewer tokens, or train with a window), or its memory diverges on this text."
        )


@lru_cache(maxsize=64)
def _sizes(structure: Structure, tree: Any, shapes: tuple) -> tuple[int, Any, int]:
    """(vocabulary, dtype of the logits, tokens read at a time) of a model, found without computation.

    A piece has PREFILL tokens; fewer if a cache holds less, more if a mixer must see more at once.
    """
    params = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in shapes])

    def read(params, tokens, ids):
        model = structure.model(params)
        return model.logits(model(tokens, model.init_memory(1), segment_ids=ids).hidden)

    piece = max(PREFILL, structure.model(params).least_call)
    while True:
        tokens = jax.ShapeDtypeStruct((1, piece), jnp.int32)
        try:
            found = jax.eval_shape(read, params, tokens, tokens)
            return found.shape[-1], found.dtype, piece
        except UserError:
            if piece == 1:
                raise
            piece //= 2


def sample(
    model: nnx.Module,
    prompts: Any,
    *,
    tokens: int,
    sampling: Sampling | None = None,
    dtype: Any = None,
    **settings: Any,
) -> Int[np.ndarray, "B new"]:
    """Samples up to `tokens` tokens after each prompt; a stopped row is filled with -1.

    prompts: token ids, one prompt or several of any lengths. `settings` are fields of `Sampling`, instead of one.
    dtype: the compute dtype; None = that of the parameters. Raises UserError for an empty prompt, an id outside the
    vocabulary, a setting out of range, weights that are not numbers, or if a cache of declared capacity overflows.
    """
    from engrax.models.session import Session

    session = Session(model, rows=1 if is_one(prompts) else len(prompts), dtype=dtype)
    return session.feed(prompts).sample(tokens, draws.of(sampling, settings))
