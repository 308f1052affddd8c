"""One block of one head of the neural memory: the dual form and its hand-written derivative.

A block reads from *bases*: its initial state and, if a segment may begin inside it, the reset state. Each token's
memory is a combination of the bases' matrices (see `gates`) plus rank-one writes. Letters are as in `types`, without N,
B and H, which are mapped over.

Forward, for layers l = 1..L with x_1 = k, u_1 = q, M_l the anchor, and D = 0 above the diagonal:

    keys    z_l = x_l M_l,  x_{l+1} = act(z_l)
            delta_L = z_L - v,  r_l = delta_{l+1} M_{l+1}^T,  delta_l = r_l act'(z_l)
    read    D_l = C (u_l x_l^T),  y_l = A u_l W_l + B u_l S_l - D_l delta_l,  u_{l+1} = act(y_l);  out = y_L
    carry   W_l <- A W_l + B S_l - x_l^T C_last delta_l,   S_l <- P S_l - x_l^T E_last delta_l

The derivative walks these lines backwards: `_read_bwd`, `_carry_bwd`, `_keys_bwd`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from engrax.pallas_kernels.neural_memory.gates import Coefficients
from engrax.pallas_kernels.neural_memory.types import Layers, with_derivatives

Rows = tuple[Float[Array, "S _"], ...]  # one array of token rows per layer


class Bases(NamedTuple):
    """The states a block reads from, one entry per base (carried state, reset state).

    anchor: of the tokens on the carried state; None: the carried weights themselves. For tokens on the reset state, the
    anchor is the reset weights.
    """

    weights: tuple[Layers, ...]
    momentum: tuple[Layers, ...]
    anchor: Layers | None

    @property
    def anchors(self) -> tuple[Layers, ...]:
        return self.weights if self.anchor is None else (self.anchor, *self.weights[1:])


class Saved(NamedTuple):
    """Values saved for the backward pass of a block, besides its inputs; x, u and delta follow elementwise."""

    z: Rows  # keys before the activation, layers 1..L-1
    r: Rows  # gradient after the activation, layers 1..L-1
    error: Float[Array, "S V"]  # delta_L
    y: Rows  # queries before the activation, layers 1..L-1
    scores: Rows  # D_l, layers 2..L


def _transposed(x, m):  # x @ m.T
    return jnp.einsum("so,io->si", x, m)


def outer(x, y):
    """Returns x^T y. A device may pass its own version as `outer` to the functions below."""
    return jnp.einsum("si,so->io", x, y)


def _combine(scales, products):
    """Returns sum_j scales[:, j] * products[j]; with scales None, the only product unchanged."""
    if scales is None:
        return products[0]
    return sum(scales[:, j, None] * p for j, p in enumerate(products))


def _scale(scales, j, x):
    return x if scales is None else scales[:, j, None] * x


def _dots(x, products):
    """Returns [S, R]: the row-wise inner product of x with each product."""
    return jnp.stack([jnp.sum(x * p, axis=-1) for p in products], axis=-1)


def _layer(layers_by_base, layer):
    return [layers[layer] for layers in layers_by_base]


def _keys(c: Coefficients, k, v, anchor, f, df):
    """Returns (z, r, error): the memory's forward and backward pass on the keys at the anchor."""
    depth, x, z, r = len(anchor[0]), k, [], []
    for layer in range(depth):
        z.append(_combine(c.anchor, [x @ m for m in _layer(anchor, layer)]))
        x = f(z[-1])
    error = delta = z.pop() - v
    for layer in range(depth - 1, 0, -1):
        r.insert(0, _combine(c.anchor, [_transposed(delta, m) for m in _layer(anchor, layer)]))
        delta = r[0] * df(z[layer - 1])
    return tuple(z), tuple(r), error


def _inputs_and_deltas(k, saved_z, saved_r, error, f, df):
    """Returns x_l and delta_l of every layer."""
    return (k, *map(f, saved_z)), (*(r * df(z) for z, r in zip(saved_z, saved_r)), error)


def chunk_forward(c: Coefficients, first_scores, q, k, v, bases: Bases, activation: str, outer=outer):
    """Returns (out, weights, momentum) after the block, and the values saved for the backward pass.

    first_scores: D_1 `[S, S]`, which does not depend on the memory.
    """
    f, df, _ = with_derivatives(activation)
    z, r, error = _keys(c, k, v, bases.anchors, f, df)
    xs, deltas = _inputs_and_deltas(k, z, r, error, f, df)
    u, ys, scores = q, [], []
    for layer, (x, delta) in enumerate(zip(xs, deltas)):
        d = first_scores if layer == 0 else c.write * _transposed(u, x)
        y = _combine(c.read_weights, [u @ m for m in _layer(bases.weights, layer)])
        y = y + _combine(c.read_momentum, [u @ m for m in _layer(bases.momentum, layer)]) - d @ delta
        u = f(y)
        ys.append(y)
        scores.append(d)
    weights, momentum = chunk_carry(c, xs, deltas, bases, outer)
    out = ys.pop()
    return (out, weights, momentum), Saved(z, r, error, tuple(ys), tuple(scores[1:]))


def chunk_carry(c: Coefficients, xs: Rows, deltas: Rows, bases: Bases, outer=outer) -> tuple[Layers, Layers]:
    """Returns weights and momentum after the block."""
    new_weights, new_momentum = [], []
    for layer, (x, delta) in enumerate(zip(xs, deltas)):
        ws, ss = _layer(bases.weights, layer), _layer(bases.momentum, layer)
        w = sum(c.read_weights[-1, j] * w + c.read_momentum[-1, j] * s for j, (w, s) in enumerate(zip(ws, ss)))
        s = sum(c.last_momentum[j] * s for j, s in enumerate(ss))
        new_weights.append(w - outer(x, c.write[-1, :, None] * delta))
        new_momentum.append(s - outer(x, c.last_write[:, None] * delta))
    return tuple(new_weights), tuple(new_momentum)


def chunk_replay(c: Coefficients, k, bases: Bases, saved: Saved, activation: str, outer=outer) -> tuple[Layers, Layers]:
    """Returns weights and momentum after the block, from its saved values."""
    f, df, _ = with_derivatives(activation)
    return chunk_carry(c, *_inputs_and_deltas(k, saved.z, saved.r, saved.error, f, df), bases, outer)


class _Grads:
    """Cotangents of one block, accumulated as the derivative proceeds; None: nothing yet."""

    def __init__(self, bases: Bases, outer):
        self.outer = outer
        depth, self.coefficients, self.anchored = len(bases.weights[0]), {}, bases.anchor is not None
        self.x, self.delta = [None] * depth, [None] * depth
        kinds = ("weights", "momentum", "anchor")
        self.matrices = {kind: [[None] * depth for _ in bases.weights] for kind in kinds}
        self.outers = {kind: [[[] for _ in range(depth)] for _ in bases.weights] for kind in kinds}

    def add(self, slots, index, value):
        slots[index] = value if slots[index] is None else slots[index] + value

    def add_coefficient(self, name, value):
        self.coefficients[name] = value if name not in self.coefficients else self.coefficients[name] + value

    def add_matrix(self, kind, base, layer, value):
        self.add(self.matrices[kind][base], layer, value)

    def add_outer(self, kind, base, layer, x, y):
        """Adds x^T y; all products of one matrix are computed at the end as one product over all rows."""
        if kind == "anchor" and (base > 0 or not self.anchored):
            kind = "weights"
        self.outers[kind][base][layer].append((x, y))

    def bases(self) -> Bases:
        for kind, by_base in self.outers.items():
            for base, by_layer in enumerate(by_base):
                for layer, pairs in enumerate(by_layer):
                    if pairs:
                        x, y = (jnp.concatenate(rows) for rows in zip(*pairs))
                        self.add_matrix(kind, base, layer, self.outer(x, y))
        weights, momentum, anchor = (
            tuple(map(tuple, self.matrices[kind])) for kind in ("weights", "momentum", "anchor")
        )
        return Bases(weights, momentum, anchor[0] if self.anchored else None)


def _read_bwd(g: _Grads, c, first_scores, q, xs, deltas, saved: Saved, bases, out_bar, f, df):
    """Derivative of the read. Returns the cotangents of q and of first_scores."""
    us, y_bar = (q, *map(f, saved.y)), out_bar
    for layer in range(len(xs) - 1, -1, -1):
        u, x, delta = us[layer], xs[layer], deltas[layer]
        u_bar = 0
        for name, kind, scales in (
            ("read_weights", "weights", c.read_weights),
            ("read_momentum", "momentum", c.read_momentum),
        ):
            products = [_transposed(y_bar, m) for m in _layer(getattr(bases, kind), layer)]
            u_bar = u_bar + _combine(scales, products)
            g.add_coefficient(name, _dots(u, products))
            for j in range(len(products)):
                g.add_outer(kind, j, layer, u, _scale(scales, j, y_bar))
        d_bar = -_transposed(y_bar, delta)
        d = first_scores if layer == 0 else saved.scores[layer - 1]
        g.add(g.delta, layer, -g.outer(d, y_bar))
        if layer == 0:
            return u_bar, d_bar
        products_bar = c.write * d_bar
        g.add_coefficient("write", d_bar * _transposed(u, x))
        g.add(g.x, layer, g.outer(products_bar, u))
        y_bar = (u_bar + products_bar @ x) * df(saved.y[layer - 1])


def _carry_bwd(g: _Grads, c, xs, deltas, bases, weights_bar, momentum_bar):
    """Derivative of the carry, given the cotangents of the next block's weights and momentum."""
    a_bar = b_bar = p_bar = write_bar = last_write_bar = 0
    for layer, (x, delta, w_bar, s_bar) in enumerate(zip(xs, deltas, weights_bar, momentum_bar)):
        ws, ss = _layer(bases.weights, layer), _layer(bases.momentum, layer)
        for j in range(len(ws)):
            g.add_matrix("weights", j, layer, c.read_weights[-1, j] * w_bar)
            g.add_matrix("momentum", j, layer, c.read_momentum[-1, j] * w_bar + c.last_momentum[j] * s_bar)
        a_bar = a_bar + jnp.stack([jnp.sum(w_bar * w) for w in ws])
        b_bar = b_bar + jnp.stack([jnp.sum(w_bar * s) for s in ss])
        p_bar = p_bar + jnp.stack([jnp.sum(s_bar * s) for s in ss])
        by_w, by_s = x @ w_bar, x @ s_bar
        write_bar = write_bar - jnp.sum(by_w * delta, axis=-1)
        last_write_bar = last_write_bar - jnp.sum(by_s * delta, axis=-1)
        row_w, row_s = c.write[-1, :, None], c.last_write[:, None]
        g.add(g.delta, layer, -(row_w * by_w + row_s * by_s))
        g.add(g.x, layer, -(row_w * _transposed(delta, w_bar) + row_s * _transposed(delta, s_bar)))
    last = jnp.arange(c.write.shape[0])[:, None] == c.write.shape[0] - 1
    g.add_coefficient("read_weights", jnp.where(last, a_bar, 0))
    g.add_coefficient("read_momentum", jnp.where(last, b_bar, 0))
    g.add_coefficient("write", jnp.where(last, write_bar, 0))
    g.add_coefficient("last_momentum", p_bar)
    g.add_coefficient("last_write", last_write_bar)


def _keys_bwd(g: _Grads, c, xs, deltas, saved: Saved, bases, df, d2f):
    """Derivative of the inner gradient itself (second order). Returns the cotangents of k and v."""
    depth, z_bar = len(xs), [None] * len(xs)

    def scales_bar(x, products):
        if c.anchor is not None:
            g.add_coefficient("anchor", _dots(x, products))

    for layer in range(depth - 1):
        z, delta_bar = saved.z[layer], g.delta[layer]
        z_bar[layer] = delta_bar * saved.r[layer] * d2f(z)
        r_bar, above = delta_bar * df(z), deltas[layer + 1]
        products = [r_bar @ m for m in _layer(bases.anchors, layer + 1)]
        g.add(g.delta, layer + 1, _combine(c.anchor, products))
        scales_bar(above, products)
        for j in range(len(products)):
            g.add_outer("anchor", j, layer + 1, _scale(c.anchor, j, r_bar), above)
    z_bar[-1] = g.delta[-1]
    for layer in range(depth - 1, -1, -1):
        x = xs[layer]
        products = [_transposed(z_bar[layer], m) for m in _layer(bases.anchors, layer)]
        g.add(g.x, layer, _combine(c.anchor, products))
        scales_bar(x, products)
        for j in range(len(products)):
            g.add_outer("anchor", j, layer, x, _scale(c.anchor, j, z_bar[layer]))
        if layer:
            z_bar[layer - 1] = z_bar[layer - 1] + g.x[layer] * df(saved.z[layer - 1])
    return g.x[0], -g.delta[-1]


def chunk_backward(
    c: Coefficients, first_scores, q, k, bases: Bases, saved: Saved, cotangents, activation: str, outer=outer
):
    """Returns the cotangents (coefficients, first_scores, q, k, v, bases) of `chunk_forward`.

    cotangents: those of (out, weights, momentum).
    """
    f, df, d2f = with_derivatives(activation)
    out_bar, weights_bar, momentum_bar = cotangents
    xs, deltas = _inputs_and_deltas(k, saved.z, saved.r, saved.error, f, df)
    g = _Grads(bases, outer)
    q_bar, first_bar = _read_bwd(g, c, first_scores, q, xs, deltas, saved, bases, out_bar, f, df)
    _carry_bwd(g, c, xs, deltas, bases, weights_bar, momentum_bar)
    k_bar, v_bar = _keys_bwd(g, c, xs, deltas, saved, bases, df, d2f)
    return Coefficients(**{"anchor": None, **g.coefficients}), first_bar, q_bar, k_bar, v_bar, g.bases()
