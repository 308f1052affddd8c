"""The subject of the laws: a mixer or a model as one pure function, with parameters scaled up and packed test rows.

A `Subject` hides the difference between mixers (inputs are vectors [B, T, D]) and models (inputs are token ids [B, T],
outputs are logits), so that each law has one body.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.laws.breach import Breach
from engrax.laws.layouts import ROWS, packed_ids
from engrax.models import ModelConfig
from engrax.models.contract import as_model
from engrax.models.parameters import cast, declare_roles

BOUND = 1e3  # above it the memory diverges, and every law would fail by rounding


def values_of(config: Any, name: str) -> list:
    """All values of the field `name` in a config and the configs inside it, without None."""
    if not dataclasses.is_dataclass(config):
        return [v for item in config for v in values_of(item, name)] if isinstance(config, (tuple, list)) else []
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found += [value] if field.name == name and value is not None else values_of(value, name)
    return found


def raise_capacity(config: Any, tokens: int) -> Any:
    """The config with every field `capacity` raised to `tokens`, also in the configs inside it."""
    if isinstance(config, (tuple, list)):
        items = [raise_capacity(item, tokens) for item in config]
        return config if all(a is b for a, b in zip(items, config)) else type(config)(items)
    if not dataclasses.is_dataclass(config):
        return config
    changes = {}
    for field in dataclasses.fields(config):
        old = getattr(config, field.name)
        raised = field.name == "capacity" and isinstance(old, int) and old < tokens
        new = tokens if raised else raise_capacity(old, tokens)
        if field.init and new is not old:
            changes[field.name] = new
    return dataclasses.replace(config, **changes) if changes else config


class Subject:
    """A config under test: `apply(params, x, state, ids) -> (y, state)`, compiled once per shape, shared by the laws.

    Create and use it with 64-bit types on; if `wide` is False, with 64-bit types off. Inputs are NumPy arrays, because
    slicing a JAX array compiles a program.

    Args:
      config: a mixer's or a model's config.
      dim: the model width of a mixer.
      seed: seed of the inputs and of the noise on the parameters.
      thorough: laws run on rows with and without segment ids; else only on packed rows, with half the programs.
      default_chunk: the chunk, in tokens, of a config without a field `chunk_size`; rows have 3 chunks + 7 tokens.
      wide: float64, where rounding is 1e-16; else float32, for modules that always compute in float32.
      optimised: compile as for users; else, on a CPU, without optimisation, which is faster here.
    """

    def __init__(
        self,
        config: Any,
        *,
        dim: int = 16,
        seed: int = 0,
        thorough: bool = True,
        default_chunk: int = 8,
        wide: bool = True,
        optimised: bool = False,
    ):
        self.optimised = optimised
        self.config, self.dim, self.thorough, self.wide = config, dim, thorough, wide
        self.is_model = isinstance(config, ModelConfig)
        self.dtype = np.float64 if wide else np.float32
        self.rounding = 1e-9 if wide else 2e-4  # relative to the largest compared value
        self.gradient_rounding = 1e-8 if wide else 2e-3
        self.chunk = max(values_of(config, "chunk_size"), default=default_chunk)
        self.length = 3 * self.chunk + 7
        self.rng = np.random.default_rng(seed)
        self.graphdef, *_ = nnx.split(nnx.eval_shape(lambda: self._build(config)), nnx.Param, ...)
        self.initial, self.rest = jax.jit(lambda: nnx.split(self._build(config), nnx.Param, ...)[1:])()
        self.rest = jax.tree.map(lambda leaf: leaf.astype(self.dtype) if is_float(leaf) else leaf, self.rest)
        self._compile()
        self.vocab = self._vocabulary() if self.is_model else 0
        self.x = self.inputs(ROWS, self.length)
        self.ids = packed_ids(self.chunk, self.length, padding=self.is_model)
        self.one_segment = np.zeros_like(self.ids)
        self.params = self._scaled_up()
        shape = jax.eval_shape(self.apply, self.params, self.x)[0].shape
        self.weights = self.rng.standard_normal(shape) / self.length**0.5  # projects outputs to one number

    def _compile(self):
        # On CPU no program runs often enough to pay for optimised machine code.
        device = jax.config.jax_default_device or jax.devices()[0]
        level = 3 if self.optimised else 0  # 3 is XLA's default
        options = {"xla_backend_optimization_level": level} if device.platform == "cpu" else None
        self.run = jax.jit(self.apply, compiler_options=options)
        self.start = jax.jit(self.init_state, static_argnums=1, compiler_options=options)
        self.pullback = jax.jit(self._pullback, static_argnames="cuts", compiler_options=options)

    def _build(self, config):
        rngs = nnx.Rngs(0)
        module = config.build(rngs=rngs) if self.is_model else config.build(self.dim, rngs=rngs)
        return declare_roles(module, strict=False)  # training refuses parameters without a role; the laws need none

    def _vocabulary(self) -> int:
        """The vocabulary of a model: the width of its logits."""
        return jax.eval_shape(self.apply, self.initial, np.zeros((1, 1), np.int32))[0].shape[-1]

    def apply(self, params, x, state=None, ids=None):
        """One call: outputs (logits of a model) and the state after it."""
        module = nnx.merge(self.graphdef, params, self.rest)
        if not self.is_model:
            return module(x, state, ids)
        model = as_model(module)  # as training calls it
        out = model(x, state, segment_ids=ids)
        return model.logits(out.hidden), out.memory

    def _pullback(self, params, x, ids, weights, cuts=()):
        """Gradients of sum(weights * outputs) by the parameters and, for a mixer, by the inputs.

        The outputs come from one call, or from several calls if `cuts` cut the row.
        """
        bounds = [0, *cuts, x.shape[1]]

        def total(params, x):
            state, found = None, 0.0
            for a, b in zip(bounds, bounds[1:]):
                y, state = self.apply(params, x[:, a:b], state, None if ids is None else ids[:, a:b])
                found += jnp.sum(weights[:, a:b] * y)
            return found

        return jax.grad(total, argnums=0 if self.is_model else (0, 1))(params, x)

    def init_state(self, params, batch_size: int):
        """The state before the first token of `batch_size` rows."""
        module = nnx.merge(self.graphdef, params, self.rest)
        return module.init_memory(batch_size) if self.is_model else module.init_state(batch_size)

    def layouts(self, deep: bool) -> tuple:
        """The segment ids that a law runs with: none (one segment) and packed rows, or only packed rows."""
        return (None, self.ids) if self.thorough or deep else (self.ids,)

    def shown(self, y, ids) -> np.ndarray:
        """Outputs as NumPy, zero at padding, where no law applies."""
        y = np.asarray(y)
        return y if ids is None else np.where((np.asarray(ids) >= 0)[..., None], y, 0)

    def variant(self, config) -> "Subject":
        """The same parameters and inputs under another config, e.g. another implementation of the same mathematics."""
        other = object.__new__(Subject)
        other.__dict__.update(self.__dict__, config=config)
        other.graphdef, *_ = nnx.split(nnx.eval_shape(lambda: other._build(config)), nnx.Param, ...)
        other._compile()
        return other

    def with_capacity(self, tokens: int) -> "Subject":
        """The subject with caches of `tokens` tokens, if its config has fields `capacity`."""
        config = raise_capacity(self.config, tokens)
        return self if config is self.config else self.variant(config)

    def inputs(self, batch: int, length: int):
        """Random inputs: token ids of a model, standard normal vectors of a mixer."""
        if self.is_model:
            return self.rng.integers(0, self.vocab, (batch, length)).astype(np.int32)
        return self.rng.standard_normal((batch, length, self.dim)).astype(self.dtype)

    def changed(self, x, where):
        """The inputs with every position of the mask `where [B, T]` replaced by something else."""
        if self.is_model:
            other = (x + self.rng.integers(1, self.vocab, x.shape)) % self.vocab
            return np.where(where, other, x).astype(x.dtype)
        return np.where(where[..., None], 3.0 * self.rng.standard_normal(x.shape) - x, x).astype(x.dtype)

    def _scaled_up(self):
        """Parameters with normal noise well above their initialisation: the largest that keeps the memory bounded.

        A test-time memory is gradient descent: at weights too large it diverges, and then every law fails by rounding.
        """
        leaves, tree = jax.tree.flatten(self.initial)
        leaves = [np.asarray(p, self.dtype) if is_float(p) else np.asarray(p) for p in leaves]
        noise = [self.rng.standard_normal(p.shape) for p in leaves]
        ids = None if self.thorough else self.one_segment  # the program that the laws use
        finite = None
        for scale in (2.0, 1.0, 0.5, 0.25):
            moved = [p + scale * noise_width(p) * n if is_float(p) else p for p, n in zip(leaves, noise)]
            scaled = jax.tree.unflatten(tree, [jnp.asarray(m, p.dtype) for m, p in zip(moved, leaves)])
            found = [np.asarray(leaf) for leaf in jax.tree.leaves(self.run(scaled, self.x, None, ids))]
            largest = max(float(np.max(np.abs(leaf))) for leaf in found if is_float(leaf) and leaf.size)
            if largest < BOUND:
                return scaled
            finite = scaled if np.isfinite(largest) else finite
        if finite is None:
            message = f"{self.config} diverges at parameters only a quarter above their initialisation"
            raise Breach(message, law="stability.long")
        return finite

    @functools.cached_property
    def batch_axes(self):
        """The batch axis of every leaf of the state, found from the shapes alone."""
        shapes = [jax.eval_shape(lambda p, n=n: self.init_state(p, n), self.params) for n in (2, 5)]

        def axis(path, a, b):
            differ = [i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if (m, n) == (2, 5)]
            if len(differ) != 1:
                message = f"it has shapes {a.shape} and {b.shape} for 2 and 5 rows: no batch axis"
                raise Breach(message, position=jax.tree_util.keystr(path))
            return differ[0]

        return jax.tree_util.tree_map_with_path(axis, *shapes)

    def take_rows(self, state, rows):
        """The state of some rows; a mixer's leaves are [B, ...]."""
        rows = np.asarray(rows)
        if self.is_model:
            return jax.tree.map(lambda leaf, axis: np.take(np.asarray(leaf), rows, axis=axis), state, self.batch_axes)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[rows] if np.ndim(leaf) else leaf, state)

    def join_rows(self, states):
        """One state with the rows of several states."""
        if self.is_model:
            return jax.tree.map(lambda axis, *leaves: np.concatenate(leaves, axis=axis), self.batch_axes, *states)
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *states)


def noise_width(p) -> float:
    """Standard deviation of the noise on a parameter: about its own size, never tiny."""
    floor = p.shape[-2] ** -0.5 if p.ndim > 1 else 0.5
    return float(np.clip(np.sqrt(np.mean(p * p)), floor, 1.0))


def is_float(leaf) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def in_bfloat16(params):
    """The parameters as used in bfloat16 training; needs 64-bit types off."""
    return cast(params, jnp.bfloat16)
