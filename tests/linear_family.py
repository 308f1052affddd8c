"""The papers of the mixers with a matrix memory, written plainly in NumPy, and what their tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.layers import MIXERS

DIM, ROWS, LENGTH = 8, 2, 11
SMALL = dict(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=4, conv_width=3)
TIED = SMALL | dict(value_heads=2)  # mixers whose keys are gates


def built(name, rng, **settings):
    """The mixer in float64, every parameter moved away from where it starts."""
    module = MIXERS[name](**settings).build(DIM, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(module, nnx.Param)
    move = lambda p: jnp.asarray(np.asarray(p, np.float64) + 0.3 * rng.standard_normal(p.shape))  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(move, params))


def jitted(module, method, *args):
    """module.method(*args), compiled."""
    graphdef, params = nnx.split(module)
    return jax.jit(lambda params, args: getattr(nnx.merge(graphdef, params), method)(*args))(params, args)


def inputs(rng, rows=ROWS):
    return jnp.asarray(rng.standard_normal((rows, LENGTH, DIM)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, scale):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def value(p):
    return np.asarray(p[...])


def low_rank(m, x):
    return x @ value(m.down.kernel) @ value(m.up.kernel)


def projected(m, x):
    """q, k, v after projection and convolution, heads of queries repeated for their value heads."""
    c = m.config
    z = x @ value(m.qkv.kernel)
    if c.conv_width > 1:
        taps, plain = value(m.conv.kernel), z
        z = np.zeros_like(plain)
        for t in range(LENGTH):
            for j in range(min(t + 1, c.conv_width)):
                z[:, t] += taps[j] * plain[:, t - j]
    HV, _ = c.values
    parts = np.split(z, [c.widths[0], 2 * c.widths[0]], axis=-1)
    q, k, v = (y.reshape(*x.shape[:2], h, -1) for y, h in zip(parts, (c.heads, c.heads, HV)))
    return *(np.repeat(y, HV // c.heads, axis=2) for y in (q, k)), v


def scan(q, k, v, decay, scale, beta=None):
    """S = diag(decay_t) S, plus k_t v_t^T or the delta rule's correction, read with scale q_t."""
    state, out = np.zeros((*k.shape[:1], *k.shape[2:], v.shape[-1])), np.zeros((*q.shape[:3], v.shape[-1]))
    decay = np.broadcast_to(decay if np.ndim(decay) == 4 else np.asarray(decay)[..., None], k.shape)
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state
        written = v[:, t]
        if beta is not None:
            written = beta[:, t, :, None] * (v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state))
        state = state + k[:, t, :, :, None] * written[:, :, None, :]
        out[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return out


def softmax_scores(q, k, v, score):
    """sum_j score(q_t . k_j) v_j / sum_j score(q_t . k_j) over j <= t."""
    s = np.tril(score(np.einsum("bthk,bshk->bhts", q, k)))
    return np.einsum("bhts,bshv->bthv", s / s.sum(axis=-1, keepdims=True), v)


def finished(m, x, read, act=silu):
    """y_t = W_o (norm(read) * act(x W_gate)), what the mixer has of it."""
    flat = read.reshape(*read.shape[:2], -1)
    if m.norm_width == "all":
        flat = rms(flat, value(m.norm.scale))
    if m.norm_width == "head":
        flat = rms(read, value(m.norm.scale)).reshape(flat.shape)
    if m.config.output_gate:
        flat = flat * act(x @ value(m.gate.kernel) if hasattr(m.gate, "kernel") else low_rank(m.gate, x))
    return flat @ value(m.out.kernel)


def steps(m, x):
    """softplus(x W + b) and the decay exp(-exp(A) step), per head and channel."""
    project = low_rank(m.decay.project, x) if hasattr(m.decay.project, "down") else x @ value(m.decay.project.kernel)
    step = softplus(project.reshape(*x.shape[:2], *m.decay.bias.shape) + value(m.decay.bias))
    return step, np.exp(-np.exp(value(m.decay.log_rate))[:, None] * step)


# --- the papers' equations, token by token ----------------------------------------------------------------------------


def plain_linear_attention(m, x):
    q, k, v = (silu(y) for y in projected(m, x))
    phi = lambda y: np.where(y > 0, y + 1, np.exp(y))  # noqa: E731
    ones = np.ones((*v.shape[:-1], 1))
    read = scan(phi(q), phi(k), v, 1.0 + 0 * ones[..., 0], 1.0)
    return finished(m, x, read / scan(phi(q), phi(k), ones, 1.0 + 0 * ones[..., 0], 1.0))


def plain_retnet(m, x):
    """The paper's parallel form: (Q K^T * D) V with rotations e^{i n theta} and D_nm = gamma^(n - m)."""
    q, k, v = (silu(y) for y in projected(m, x))
    half, n = q.shape[-1] // 2, np.arange(LENGTH)
    turn = np.exp(1j * n[:, None, None] * 10_000.0 ** (-np.arange(half) / half))
    q, k = ((y[..., :half] + 1j * y[..., half:]) * turn for y in (q, k))
    gamma = 1 - 2.0 ** (-5.0 - np.arange(v.shape[2]))
    decay = np.tril(gamma[:, None, None] ** np.maximum(n[:, None] - n[None, :], 0))
    scores = np.einsum("bthk,bshk->bhts", q, k.conj()).real * decay
    return finished(m, x, np.einsum("bhts,bshv->bthv", scores, v) / (2 * half) ** 0.5)


def plain_lightning(m, x):
    q, k, v = (silu(y) for y in projected(m, x))
    slopes = np.exp(-(8 / v.shape[2]) * np.clip(value(m.depth), 0, 1) * np.arange(v.shape[2]))
    return finished(m, x, scan(q, k, v, np.broadcast_to(slopes, v.shape[:3]), q.shape[-1] ** -0.5), sigmoid)


def plain_gla(m, x):
    q, k, v = (silu(y) for y in projected(m, x))
    alpha = sigmoid(low_rank(m.forget, x).reshape(k.shape) + value(m.forget_bias)) ** (1 / 16)
    return finished(m, x, scan(q, k, v, alpha, q.shape[-1] ** -0.5))


def plain_mamba2(m, x):
    c, b, u = (silu(y) for y in projected(m, x))
    step, decay = steps(m, x)
    read = scan(c, b, step * u, decay[..., 0], 1.0) + value(m.skip)[:, None] * u
    gated = read.reshape(*read.shape[:2], -1) * silu(x @ value(m.gate.kernel))
    return rms(gated, value(m.norm.scale)) @ value(m.out.kernel)


def plain_hgrn2(m, x):
    q, logits, v = projected(m, x)
    bound = sigmoid(value(m.forget_bound))
    forget = bound + (1 - bound) * sigmoid(logits)
    return finished(m, x, scan(silu(q), 1 - forget, v, forget, q.shape[-1] ** -0.5))


def plain_delta(m, x):
    """DeltaNet, and with a decay Gated DeltaNet and KDA."""
    q, k, v = (silu(y) for y in projected(m, x))
    beta = m.config.max_beta * sigmoid(x @ value(m.beta.kernel))
    decay = steps(m, x)[1] if hasattr(m, "decay") else np.ones((*v.shape[:3], 1))
    act = sigmoid if m.config.registered_name == "kda" else silu
    return finished(m, x, scan(unit(q), unit(k), v, decay, q.shape[-1] ** -0.5, beta), act)


def plain_gsa(m, x):
    q, k, v = (silu(y) for y in projected(m, x))
    alpha = sigmoid(x @ value(m.forget.kernel)).reshape(*x.shape[:2], m.config.heads, -1) ** (1 / 8)
    keys = np.zeros((*alpha.shape[:1], *alpha.shape[2:], k.shape[-1]))  # [B, H, M, K]
    values = np.zeros((*alpha.shape[:1], *alpha.shape[2:], v.shape[-1]))
    read = np.zeros_like(v)
    for t in range(LENGTH):
        keep = alpha[:, t, :, :, None]
        keys = keep * keys + (1 - keep) * k[:, t, :, None, :]
        values = keep * values + (1 - keep) * v[:, t, :, None, :]
        weights = np.exp(np.einsum("bhmk,bhk->bhm", keys, q[:, t]))
        weights /= weights.sum(axis=-1, keepdims=True)
        read[:, t] = np.einsum("bhm,bhmv->bhv", weights, values)
    return finished(m, x, silu(read))


def plain_based(m, x):
    q, k, v = (silu(y) for y in projected(m, x))
    return finished(m, x, softmax_scores(q / q.shape[-1] ** 0.5, k, v, lambda s: 1 + s + s * s / 2))


def plain_rebased(m, x):
    q, k, v = (silu(y) for y in projected(m, x))
    q, k = (
        (y - y.mean(axis=-1, keepdims=True)) / np.sqrt(y.var(axis=-1, keepdims=True) + 1e-6) * value(n.scale)
        + value(n.bias)
        for y, n in ((q, m.q_norm), (k, m.k_norm))
    )
    return finished(m, x, softmax_scores(q / q.shape[-1] ** 0.5, k, v, lambda s: s * s))


def plain_prefix(m, x):
    """Every query sees all prefix tokens, those after it too."""
    P, (q, k, v) = m.config.prefix, (silu(y) for y in projected(m, x))
    d, groups = q.shape[-1], m.config.values[0] // m.config.heads
    keys, values = np.split(x[:, :P] @ value(m.prefix_kv.kernel), [m.config.widths[1]], axis=-1)
    keys = np.repeat(keys.reshape(ROWS, P, m.config.heads, d), groups, axis=2)
    score = lambda a, b: (lambda s: 1 + s + s * s / 2)(np.einsum("bthk,bshk->bhts", a, b) / d**0.5)  # noqa: E731
    own, early = np.tril(score(q, k)), score(q, keys)
    read = np.einsum("bhts,bshv->bthv", own, v)
    read += np.einsum("bhts,bshv->bthv", early, values.reshape(ROWS, P, *v.shape[2:]))
    total = own.sum(axis=-1) + early.sum(axis=-1)
    return finished(m, x, read / np.moveaxis(total, 1, 2)[..., None])


def plain_infini(m, x):
    """Block after block: read the memory, attend inside the block, then write the block."""
    q, k, v = (silu(y) for y in projected(m, x))
    N, half = m.config.block, q.shape[-1] // 2
    phi = lambda y: np.where(y > 0, y + 1, np.exp(y))  # noqa: E731
    gate = sigmoid(value(m.gate_bias))[:, None]
    memory, z = np.zeros((ROWS, *k.shape[2:], v.shape[-1])), np.zeros((ROWS, *k.shape[2:]))
    read = np.zeros_like(v)
    for a in range(0, LENGTH, N):
        here = slice(a, a + N)
        qs, ks, vs = q[:, here], k[:, here], v[:, here]
        recalled = np.einsum("bthk,bhkv->bthv", phi(qs), memory)
        if a:
            recalled /= np.einsum("bthk,bhk->bth", phi(qs), z)[..., None]
        n = np.arange(qs.shape[1])
        turn = np.exp(1j * n[:, None, None] * 10_000.0 ** (-np.arange(half) / half))
        qr, kr = ((y[..., :half] + 1j * y[..., half:]) * turn for y in (qs, ks))
        logits = np.einsum("bthk,bshk->bhts", qr, kr.conj()).real / (2 * half) ** 0.5
        weights = np.tril(np.exp(logits))
        local = np.einsum("bhts,bshv->bthv", weights / weights.sum(axis=-1, keepdims=True), vs)
        read[:, here] = gate * recalled + (1 - gate) * local
        memory, z = memory + np.einsum("bthk,bthv->bhkv", phi(ks), vs), z + phi(ks).sum(axis=1)
    return finished(m, x, read)


PLAIN = {
    "linear_attention": (plain_linear_attention, SMALL),
    "retnet": (plain_retnet, SMALL),
    "lightning": (plain_lightning, SMALL),
    "gla": (plain_gla, SMALL | dict(gate_rank=3)),
    "mamba2": (plain_mamba2, SMALL),
    "hgrn2": (plain_hgrn2, TIED),
    "deltanet": (plain_delta, SMALL | dict(max_beta=1.5)),
    "gated_deltanet": (plain_delta, SMALL),
    "kda": (plain_delta, SMALL | dict(gate_rank=3)),
    "gsa": (plain_gsa, TIED | dict(slots=5)),
    "based": (plain_based, SMALL),
    "rebased": (plain_rebased, SMALL),
    "prefix_linear_attention": (plain_prefix, SMALL | dict(prefix=4)),
    "infini_attention": (plain_infini, TIED | dict(value_dim=None, block=4)),
}


NORMALISED = ("linear_attention", "based", "rebased", "prefix_linear_attention", "infini_attention")
