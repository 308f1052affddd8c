"""What the laws are run on: a mixer or a model as one pure function, with parameters scaled up and packed test rows.

A `Subject` hides the difference between mixers (inputs are vectors [B, T, D]) and models (inputs are token ids [B, T],
outputs are logits), so that each law has one body.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.models import ModelConfig

ROWS = 3  # batch rows of every law


def _values(config, name: str) -> list:
    """All values of the field `name` in a config and the configs inside it."""
    if not dataclasses.is_dataclass(config):
        return [v for item in config for v in _values(item, name)] if isinstance(config, (tuple, list)) else []
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        found += [value] if field.name == name and value is not None else _values(value, name)
    return found


class Subject:
    """A config under test: `apply(params, x, state, ids) -> (y, state)`, compiled once per shape, shared by the laws.

    Must be made, and used, where 64-bit types are on. Inputs are NumPy arrays: to slice a JAX array compiles a program.
    A subject that is not `thorough` runs most laws on packed rows only, which halves the programs to compile.
    """

    def __init__(self, config, *, dim: int = 16, seed: int = 0, thorough: bool = True):
        self.config, self.dim, self.thorough = config, dim, thorough
        self.is_model = isinstance(config, ModelConfig)
        self.chunk = max(_values(config, "chunk_size"), default=8)
        self.length = 3 * self.chunk + 7
        self.rng = np.random.default_rng(seed)
        self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: self._build(config)), nnx.Param)
        self.initial = jax.jit(lambda: nnx.state(self._build(config), nnx.Param))()
        self._compile()
        self.x = self.inputs(ROWS, self.length)
        self.ids = packed_ids(self.chunk, self.length)
        self.one_segment = np.zeros_like(self.ids)
        self.params = self._scaled_up()
        shape = jax.eval_shape(self.apply, self.params, self.x)[0].shape
        self.weights = self.rng.standard_normal(shape) / self.length**0.5  # projects outputs to one number

    def _compile(self):
        # Gradients need no fast machine code, and without it they compile in half the time.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.run = jax.jit(self.apply)
        self.start = jax.jit(self.init_state, static_argnums=1)
        self.pullback = jax.jit(self._pullback, static_argnames="cuts", compiler_options=options)

    def _build(self, config):
        rngs = nnx.Rngs(0)
        return config.build(rngs=rngs) if self.is_model else config.build(self.dim, rngs=rngs)

    def apply(self, params, x, state=None, ids=None):
        """One call: outputs (logits of a model) and the state after it."""
        module = nnx.merge(self.graphdef, params)
        if not self.is_model:
            return module(x, state, ids)
        hidden, state = module(x, state, segment_ids=ids)
        return module.logits(hidden), state

    def _pullback(self, params, x, ids, weights, cuts=()):
        """Gradients of sum(weights * outputs): of the parameters and, for a mixer, of the inputs.

        The outputs come from one call, or from the calls that `cuts` make of the row.
        """
        bounds = [0, *cuts, self.length]

        def total(params, x):
            state, found = None, 0.0
            for a, b in zip(bounds, bounds[1:]):
                y, state = self.apply(params, x[:, a:b], state, None if ids is None else ids[:, a:b])
                found += jnp.sum(weights[:, a:b] * y)
            return found

        return jax.grad(total, argnums=0 if self.is_model else (0, 1))(params, x)

    def init_state(self, params, batch_size: int):
        module = nnx.merge(self.graphdef, params)
        return module.init_memory(batch_size) if self.is_model else module.init_state(batch_size)

    def layouts(self, deep: bool) -> tuple:
        """The segment ids that a law runs with: none (one segment) and packed rows, or packed rows alone."""
        return (None, self.ids) if self.thorough or deep else (self.ids,)

    def variant(self, config) -> "Subject":
        """The same parameters and inputs under another config, e.g. another implementation of the same mathematics."""
        other = object.__new__(Subject)
        other.__dict__.update(self.__dict__, config=config)
        other.graphdef, _ = nnx.split(nnx.eval_shape(lambda: other._build(config)), nnx.Param)
        other._compile()
        return other

    def inputs(self, batch: int, length: int):
        """Random inputs: token ids of a model, standard normal vectors of a mixer."""
        if self.is_model:
            return self.rng.integers(0, self.config.vocab_size, (batch, length)).astype(np.int32)
        return self.rng.standard_normal((batch, length, self.dim))

    def changed(self, x, where):
        """The inputs with every position of the mask `where [B, T]` replaced by something else."""
        if self.is_model:
            other = (x + self.rng.integers(1, self.config.vocab_size, x.shape)) % self.config.vocab_size
            return np.where(where, other, x).astype(x.dtype)
        return np.where(where[..., None], 3.0 * self.rng.standard_normal(x.shape) - x, x)

    def _scaled_up(self):
        """float64 parameters with normal noise well above their initialisation, the most that keeps the memory bounded.

        A test-time memory is gradient descent: at weights too large it diverges, and then every law fails by rounding.
        """
        leaves, tree = jax.tree.flatten(self.initial)
        leaves = [np.asarray(p, np.float64) for p in leaves]
        noise = [self.rng.standard_normal(p.shape) for p in leaves]

        def width(p):  # of the noise: about the leaf's own size, never tiny
            floor = p.shape[-2] ** -0.5 if p.ndim > 1 else 0.5
            return np.clip(np.sqrt(np.mean(p * p)), floor, 1.0)

        ids = None if self.thorough else self.one_segment  # the program that the laws use
        for scale in (2.0, 1.0, 0.5, 0.25):
            scaled = [jnp.asarray(p + scale * width(p) * n) for p, n in zip(leaves, noise)]
            scaled = jax.tree.unflatten(tree, scaled)
            outputs = [
                leaf for leaf in jax.tree.leaves(self.run(scaled, self.x, None, ids)) if is_float(leaf) and leaf.size
            ]
            if all(np.all(np.abs(np.asarray(leaf)) < 1e3) for leaf in outputs):
                return scaled
        raise AssertionError(f"{self.config} diverges at parameters only a quarter above their initialisation")

    @functools.cached_property
    def batch_axes(self):
        """For every leaf of the state the axis that is the batch, found from the shapes alone."""
        shapes = [jax.eval_shape(lambda p, n=n: self.init_state(p, n), self.params) for n in (2, 5)]

        def axis(a, b):
            differ = [i for i, (m, n) in enumerate(zip(a.shape, b.shape)) if (m, n) == (2, 5)]
            assert len(differ) == 1, f"a state leaf has shapes {a.shape} and {b.shape} for 2 and 5 rows: no batch axis"
            return differ[0]

        return jax.tree.map(axis, *shapes)

    def take_rows(self, state, rows):
        rows = np.asarray(rows)
        return jax.tree.map(lambda leaf, axis: np.take(np.asarray(leaf), rows, axis=axis), state, self.batch_axes)

    def join_rows(self, states):
        return jax.tree.map(lambda axis, *leaves: np.concatenate(leaves, axis=axis), self.batch_axes, *states)


def is_float(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def packed_ids(chunk: int, length: int):
    """Segment ids [ROWS, length]: boundaries on and off the chunk grid, filler (-2) before, between and inside, padding
    (-1) after."""
    rows = (
        [(0, chunk + 3), (1, 1), (2, chunk - 1), (6, None), (-1, 2)],
        [(-2, 2), (0, chunk - 2), (4, chunk - 1), (-2, 3), (5, 2), (-2, 1), (5, None)],
        [(3, 2 * chunk), (9, None)],
    )
    ids = []
    for row in rows:
        rest = length - sum(n or 0 for _, n in row)
        ids.append(np.concatenate([np.full(rest if n is None else n, i) for i, n in row]))
    return np.stack(ids).astype(np.int32)
