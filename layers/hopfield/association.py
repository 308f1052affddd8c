"""Hopfield association between two sets (arXiv 2008.02217): states retrieve from stored patterns.

    q = norm(R) W_q,  k = norm(Y) W_k,  v = norm(Y') W_v
    q <- sep(beta sim(q, k)) k   (steps - 1 times),   Z = sep(beta sim(q, k)) v W_o

Every normalisation and projection is optional; `AssociationConfig.raw` has none of them, only the associative memory.
`Hopfield` takes sets; the mixers in mixer.py, pooling.py and layer.py are built from it.
"""

import dataclasses
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from engrax.errors import UserError, require_positive
from engrax.layers.common.modules import NORMS, projection
from engrax.pallas_kernels import hopfield_energy, hopfield_retrieval
from engrax.pallas_kernels.hopfield_retrieval.visibility import dense_mask
from engrax.registry import did_you_mean

Norm = Literal["none", "rms", "layer"]


@dataclasses.dataclass(frozen=True)
class AssociationConfig:
    """Settings of every Hopfield association."""

    heads: int = 4
    head_dim: int = 32  # width of a head's association space
    value_dim: int | None = None  # width of a head's values; None = head_dim
    beta: float | tuple[float, ...] | None = None  # inverse temperature, of all heads or one each; None = head_dim^-1/2
    trainable_beta: bool = False  # whether every head learns its beta, initialised there
    steps: int | None = 1  # updates, the one that reads the values included; None = until the state rests
    tolerance: float = 1e-4  # steps=None: a state rests that moves by less, in lengths of its longest pattern
    max_steps: int = 64  # steps=None: maximal number of updates
    separation: Literal["softmax", "sparsemax", "entmax"] = "softmax"
    alpha: float = 1.5  # of entmax, above 1; 2 is sparsemax
    similarity: Literal["dot", "cosine", "l2", "l1"] = "dot"
    gradient: Literal["unrolled", "implicit"] = (
        "unrolled"  # implicit needs steps=None; the states' projection gets none
    )
    state_norm: Norm = "layer"  # of states before their projection
    stored_norm: Norm = "layer"  # of stored patterns before their projection
    value_norm: Norm = "layer"  # of the values' inputs before their projection
    space_norm: Norm = "none"  # of each head's states and patterns after their projections, one for both
    project_state: bool = True  # False: a state is split into heads without projection
    project_stored: bool = True  # False: a stored pattern likewise
    values: Literal["projected", "of_stored", "plain"] = (
        "projected"  # of_stored: a projection of the projected patterns
    )
    project_output: bool = True  # False: the heads side by side
    bias: bool = False  # whether projections have one
    bias_pattern: bool = False  # one additional learned pattern and value, always visible
    zero_pattern: bool = False  # one additional pattern of zeros with value 0, always visible
    implementation: str | None = None  # of the operation: reference | xla | ...; None = chosen by platform

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, known = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in known:
                near = did_you_mean(str(value), known)
                raise UserError(f"unknown {field.name} {value!r}{near} (known: {', '.join(known)}).")
        if self.steps == 0:
            raise UserError(
                "steps=0 retrieves nothing; choose 1 for one update, None to iterate until the state rests."
            )
        for name in ("heads", "head_dim", "value_dim", "steps", "max_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        require_positive(self, "tolerance", "alpha")
        if self.gradient == "implicit" and self.steps is not None:
            raise UserError(f"gradient='implicit' needs steps=None, not steps={self.steps}.")
        if isinstance(self.beta, tuple) and len(self.beta) != self.heads:
            raise UserError(f"beta has {len(self.beta)} entries for heads={self.heads}; give one each, or one number.")
        if min(self.betas) < 0 or (self.trainable_beta and min(self.betas) == 0):
            raise UserError(f"beta={self.beta} must not be negative, and must be positive where it is trainable.")
        if self.separation == "entmax" and self.alpha <= 1:
            raise UserError(f"alpha={self.alpha} must be above 1; softmax is the limit.")
        if self.values == "plain" and self.value_dim not in (None, self.head_dim) and self.project_stored:
            raise UserError("plain values are cut into heads as they are: leave value_dim out.")

    @property
    def betas(self) -> tuple[float, ...]:
        """The inverse temperature of every head."""
        beta = self.head_dim**-0.5 if self.beta is None else self.beta
        return beta if isinstance(beta, tuple) else (float(beta),) * self.heads

    @property
    def width(self) -> int:
        """Width of the association space, all heads."""
        return self.heads * self.head_dim

    @property
    def value_width(self) -> int:
        """Width of the values, all heads."""
        return self.heads * (self.value_dim or self.head_dim)

    @property
    def retrieval(self) -> dict[str, Any]:
        """Options of the operation."""
        names = "steps tolerance max_steps separation alpha similarity gradient implementation".split()
        return {name: getattr(self, name) for name in names}

    @classmethod
    def raw(cls, width: int, *, heads: int = 1, **changes) -> "AssociationConfig":
        """An associative memory for patterns of `width`, with no projection and no normalisation; no parameters."""
        off = dict.fromkeys(("state_norm", "stored_norm", "value_norm"), "none") | {"values": "plain", "beta": 1.0}
        off |= dict.fromkeys(("project_state", "project_stored", "project_output"), False)
        return cls(heads=heads, head_dim=width // heads, **(off | changes))

    def projection_flops(self, state: int, stored: int, values: int, out: int) -> tuple[float, float]:
        """FLOPs of the projections of one state (with its output) and of one stored pattern with its value."""
        of_state = state * self.width * self.project_state + self.value_width * out * self.project_output
        of_stored = stored * self.width * self.project_stored
        if self.values != "plain":
            of_stored += (self.width if self.values == "of_stored" else values) * self.value_width
        return 2.0 * of_state, 2.0 * of_stored

    def association_flops(self, patterns: float) -> float:
        """FLOPs of the updates of one state; without a fixed number of them as for three."""
        steps = 3 if self.steps is None else self.steps
        patterns += self.bias_pattern + self.zero_pattern
        return 2.0 * patterns * (2 * self.width * (steps - 1) + self.width + self.value_width)


class Hopfield(nnx.Module):
    """States [B, N, S] retrieve from stored patterns [B, M, D] with values [B, M, E]: [B, N, O].

    dim: width of the states, and by default of stored patterns, values and results. `parts` selects the projections:
    HopfieldPooling does not project states, HopfieldLayer does not project patterns.
    """

    def __init__(
        self,
        settings: AssociationConfig,
        dim: int,
        *,
        stored_dim: int | None = None,
        value_dim: int | None = None,
        out_dim: int | None = None,
        rngs: nnx.Rngs,
        num_layers: int = 1,
        parts: tuple[str, ...] = ("state", "stored"),
    ):
        self.settings = c = settings
        stored_dim = dim if stored_dim is None else stored_dim
        value_dim = stored_dim if value_dim is None else value_dim
        if "state" in parts:
            self.state_norm = _norm(c.state_norm, dim, rngs)
            self.q = self._map(c.project_state, dim, c.width, "states", rngs)
        if "stored" in parts:
            self.stored_norm = _norm(c.stored_norm, stored_dim, rngs)
            self.k = self._map(c.project_stored, stored_dim, c.width, "stored patterns", rngs)
            self.value_norm = _norm(c.value_norm, value_dim, rngs) if c.values != "of_stored" else None
            source = c.width if c.values == "of_stored" else value_dim
            self.v = self._map(c.values != "plain", source, c.value_width, "values", rngs)
        self.space_norm = _norm(c.space_norm, c.head_dim, rngs)
        scale, bias = (2 * num_layers) ** -0.5, c.bias
        to_out = (c.value_width, out_dim or dim, ("heads", "embed"))
        self.out = projection(*to_out, rngs=rngs, scale=scale, bias=bias) if c.project_output else None
        if c.trainable_beta:
            beta = np.asarray(c.betas, np.float64)
            inverse = beta + np.log(-np.expm1(-beta))  # of softplus, without the exponential of a large beta
            self.beta_raw = nnx.Param(jnp.asarray(inverse), axes=("heads",), role="gate")
        if c.bias_pattern:
            draw = [jax.random.normal(rngs.params(), (c.heads, n // c.heads)) for n in (c.width, c.value_width)]
            self.bias_key, self.bias_value = (
                nnx.Param(x * x.shape[-1] ** -0.5, axes=("heads", "kv"), role="initial memory") for x in draw
            )

    def _map(self, project: bool, source: int, width: int, what: str, rngs) -> nnx.Linear | None:
        if project:
            return projection(source, width, ("embed", "heads"), rngs=rngs, bias=self.settings.bias)
        if source != width:
            raise UserError(
                f"{what} of width {source} are not projected, so heads x head_dim must be that, not {width}."
            )
        return None

    def __call__(
        self,
        state_BNS: Float[Array, "B N S"],
        stored_BMD: Float[Array, "B M D"] | None = None,
        values_BME: Float[Array, "B M E"] | None = None,
        *,
        mask: Bool[Array, "B M"] | Bool[Array, "B N M"] | None = None,
    ) -> Float[Array, "B N O"]:
        """Retrieves. stored: by default the states; values: inputs of the values, by default the stored patterns.
        mask: True = visible. Invisible patterns may have any value, and a state without visible patterns retrieves 0
        before the output projection."""
        q, k, v = self.spaces(state_BNS, stored_BMD, values_BME, mask)
        return self.read(self.retrieve(q, k, v, mask=mask))

    def weights(self, state_BNS, stored_BMD=None, *, mask=None) -> Float[Array, "B N H M"]:
        """The weights of the last update, over the stored patterns and then the bias and zero patterns."""
        return self.weights_of(*self.spaces(state_BNS, stored_BMD, None, mask), mask=mask)

    def weights_of(self, q_BNHK, k_BMHK, v_BMHV, **seen) -> Float[Array, "B N H M"]:
        """The same for states, patterns and values in association space; seen: as for `retrieve`."""
        k, _, seen = self.with_extra_patterns(q_BNHK, k_BMHK, v_BMHV, **seen)
        identity = jnp.broadcast_to(jnp.eye(k.shape[1], dtype=k.dtype)[None, :, None], (*k.shape[:3], k.shape[1]))
        return hopfield_retrieval(q_BNHK, k, identity, beta=self.betas(), **seen, **self.settings.retrieval)

    def energy(self, state_BNS, stored_BMD=None, *, mask=None) -> Float[Array, "B N H"]:
        """The energy of the states before the first update (`hopfield_energy`)."""
        return self.energy_of(*self.spaces(state_BNS, stored_BMD, None, mask), mask=mask)

    def energy_of(self, q_BNHK, k_BMHK, v_BMHV, **seen) -> Float[Array, "B N H"]:
        """The same for states, patterns and values in association space; seen: as for `retrieve`."""
        c = self.settings
        k, _, seen = self.with_extra_patterns(q_BNHK, k_BMHK, v_BMHV, **seen)
        options = dict(separation=c.separation, alpha=c.alpha, similarity=c.similarity)
        return hopfield_energy(q_BNHK, k, beta=self.betas(), **seen, **options)

    def spaces(self, state_BNS, stored_BMD, values_BME, mask=None):
        """Returns states [B, N, H, K], patterns [B, M, H, K] and values [B, M, H, V] in association space."""
        stored = state_BNS if stored_BMD is None else stored_BMD
        return self.states(state_BNS), *self.memory(stored, values_BME, mask)

    def memory(self, stored_BMD, values_BME=None, mask=None):
        """Returns patterns [B, M, H, K] and values [B, M, H, V], with zeros for patterns that no state sees."""
        stored = blanked(stored_BMD, mask)
        k = self.patterns(stored)
        return k, self.contents(stored if values_BME is None else blanked(values_BME, mask), k)

    def states(self, x_BNS: Float[Array, "B N S"]) -> Float[Array, "B N H K"]:
        """States in association space."""
        return self.normed(self._heads(_apply(self.q, _apply(self.state_norm, x_BNS))))

    def patterns(self, x_BMD: Float[Array, "B M D"]) -> Float[Array, "B M H K"]:
        """Stored patterns in association space."""
        return self.normed(self._heads(_apply(self.k, _apply(self.stored_norm, x_BMD))))

    def contents(self, x_BME: Float[Array, "B M E"], k_BMHK: Float[Array, "B M H K"]) -> Float[Array, "B M H V"]:
        """The values."""
        if self.settings.values == "of_stored":
            return self._heads(self.v(k_BMHK.reshape(*k_BMHK.shape[:2], -1)))
        return self._heads(_apply(self.v, _apply(self.value_norm, x_BME)))

    def normed(self, x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
        """The normalisation that states and patterns share."""
        return _apply(self.space_norm, x)

    def betas(self) -> Float[Array, " H"]:
        """The inverse temperature of every head, float32 (float64 where the parameters are)."""
        if not self.settings.trainable_beta:
            return jnp.asarray(np.asarray(self.settings.betas, np.float64))  # float32 where there is no float64
        raw = self.beta_raw[...]
        return jax.nn.softplus(raw.astype(jnp.promote_types(raw.dtype, jnp.float32)))

    def retrieve(self, q_BNHK, k_BMHK, v_BMHV, **seen) -> Float[Array, "B N H V"]:
        """Retrieval by states in association space; seen: which patterns they see, as arguments of the operation
        (`mask`, or `causal`, `window`, `segment_ids` and `stored_segment_ids`)."""
        k, v, seen = self.with_extra_patterns(q_BNHK, k_BMHK, v_BMHV, **seen)
        return hopfield_retrieval(q_BNHK, k, v, beta=self.betas(), **seen, **self.settings.retrieval)

    def read(self, y_BNHV: Float[Array, "B N H V"]) -> Float[Array, "B N O"]:
        """The heads side by side, through the output projection where there is one."""
        return _apply(self.out, y_BNHV.reshape(*y_BNHV.shape[:2], -1))

    def with_extra_patterns(self, q, k, v, **seen):
        """Returns patterns and values with the bias and zero patterns at their ends, and what the states q then see:
        with such patterns, which all see, only a dense mask says that."""
        c = self.settings
        extra = c.bias_pattern + c.zero_pattern
        if not extra:
            return k, v, seen
        mask = dense_mask(len(q), q.shape[1], k.shape[1], **seen)
        if c.bias_pattern:
            pairs = ((k, self.bias_key[...]), (v, self.bias_value[...]))
            k, v = (jnp.concatenate([x, _for_rows(b, x)], axis=1) for x, b in pairs)
        if c.zero_pattern:
            k, v = (jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1) for x in (k, v))
        if mask is not None:
            mask = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, extra)], constant_values=True)
        return k, v, dict(mask=mask)

    def _heads(self, x):
        return x.reshape(*x.shape[:-1], self.settings.heads, -1)


def blanked(x_BMD: Float[Array, "B M D"], mask: Bool[Array, "B M"] | Bool[Array, "B N M"] | None):
    """Replaces invisible patterns by zeros: gradients of parameters would be 0 times their values, and NaN for NaN.

    A mask of the wrong size is left to the operation, whose error names it.
    """
    if mask is None:
        return x_BMD
    seen = jnp.any(mask, axis=1) if mask.ndim == 3 else mask
    return x_BMD if seen.shape != x_BMD.shape[:2] else jnp.where(seen[..., None], x_BMD, 0)


def _norm(kind: str, width: int, rngs: nnx.Rngs):
    return None if kind == "none" else NORMS[kind](width, rngs=rngs)


def _apply(module, x):
    return x if module is None else module(x)


def _for_rows(x_HK, like_BMHK):
    x = x_HK.astype(like_BMHK.dtype)
    return jnp.broadcast_to(x, (like_BMHK.shape[0], 1, *x.shape))
