"""The forward pass of published linear and hybrid models in plain NumPy, float64, of one row.

Written from the formats' descriptions, on the tensors' published names. Nothing of engrax is used: a folder's
config.json and safetensors are all that is read.
"""

import json

import numpy as np
from safetensors.numpy import load_file

from engrax.tests import pretrained_numpy as older
from engrax.tests.pretrained_numpy import attend, turn


class Tensors:
    """The tensors of a checkpoint whose names begin with a prefix."""

    def __init__(self, tensors: dict[str, np.ndarray], prefix: str = ""):
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def below(self, name: str) -> "Tensors":
        return Tensors(self.tensors, f"{self.prefix}{name}.")

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y

    def conv(self, name: str, x: np.ndarray) -> np.ndarray:
        """Causal: the last tap is the current token's; x as it is if there is no convolution."""
        if f"{name}.weight" not in self:
            return x
        taps, y = self[f"{name}.weight"][:, 0], np.zeros_like(x)
        for back in range(taps.shape[1]):
            y[back:] += taps[:, -1 - back] * x[: len(x) - back]
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y


def logits(folder, tokens: np.ndarray) -> np.ndarray:
    """The logits [T, V] of one row of tokens."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    if config["model_type"] in ("llama", "mistral", "qwen2", "qwen3", "gpt2", "opt"):
        return older.logits(config, tensors, tokens)
    w = Tensors({name: value.astype(np.float64) for name, value in tensors.items()})
    return {"qwen3_5_text": _qwen3_5, "olmo_hybrid": _olmo_hybrid, "mamba2": _mamba2}.get(config["model_type"], _fla)(
        config, w, tokens
    )


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.logaddexp(x, 0)


def rms(weight, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def l2(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def heads(x, n):
    return x.reshape(len(x), n, -1)


def mlp(w, x):
    return w.linear("down_proj", silu(w.linear("gate_proj", x)) * w.linear("up_proj", x))


def head(w, x, table):
    return x @ (w["lm_head.weight"] if "lm_head.weight" in w else w[table]).T


def recurrence(q, k, v, g=None, beta=None, scale=None):
    """The reads [T, HV, V] of a matrix that decays by exp(g) per head or channel, and is written plainly or, with beta,
    by the delta rule."""
    T, H, K = q.shape
    n, V = v.shape[1:]
    out, scale = np.zeros((T, n, V)), K**-0.5 if scale is None else scale
    for j in range(n):
        S, at = np.zeros((K, V)), j * H // n
        for t in range(T):
            if g is not None:
                S = np.exp(g[t, j]).reshape(-1, 1) * S
            write = v[t, j] if beta is None else beta[t, j] * (v[t, j] - k[t, at] @ S)
            S = S + np.outer(k[t, at], write)
            out[t, j] = scale * q[t, at] @ S
    return out


def decay(w, a):
    return -np.exp(w["A_log"]) * softplus(a + w["dt_bias"])


def _qwen3_5(c, w, tokens):
    eps, x = c["rms_norm_eps"], w["model.embed_tokens.weight"][tokens]
    for i, kind in enumerate(c["layer_types"]):
        layer = w.below(f"model.layers.{i}")
        y = rms(1 + layer["input_layernorm.weight"], x, eps)
        if kind == "linear_attention":
            x = x + _qwen3_5_linear(c, layer.below("linear_attn"), y, eps)
        else:
            x = x + _qwen3_5_full(c, layer.below("self_attn"), y, eps)
        x = x + mlp(layer.below("mlp"), rms(1 + layer["post_attention_layernorm.weight"], x, eps))
    return head(w, rms(1 + w["model.norm.weight"], x, eps), "model.embed_tokens.weight")


def _qwen3_5_linear(c, w, x, eps):
    H, HV = c["linear_num_key_heads"], c["linear_num_value_heads"]
    width = H * c["linear_key_head_dim"]
    mixed = silu(w.conv("conv1d", w.linear("in_proj_qkv", x)))
    q, k, v = np.split(mixed, [width, 2 * width], axis=1)
    g, beta = decay(w, w.linear("in_proj_a", x)), sigmoid(w.linear("in_proj_b", x))
    read = recurrence(l2(heads(q, H)), l2(heads(k, H)), heads(v, HV), g, beta)
    read = rms(w["norm.weight"], read, eps) * silu(heads(w.linear("in_proj_z", x), HV))
    return w.linear("out_proj", read.reshape(len(x), -1))


def _qwen3_5_full(c, w, x, eps):
    H, K = c["num_attention_heads"], c["head_dim"]
    both = w.linear("q_proj", x).reshape(len(x), H, 2, K)
    q, k, v = both[:, :, 0], heads(w.linear("k_proj", x), c["num_key_value_heads"]), w.linear("v_proj", x)
    q, k = (rms(1 + w[f"{n}_norm.weight"], y, eps) for n, y in (("q", q), ("k", k)))
    rope = c["rope_parameters"]
    width = int(K * rope["partial_rotary_factor"])
    frequencies = rope["rope_theta"] ** (-2 * np.arange(width // 2) / width)
    q, k = (np.concatenate([turn(y[..., :width], frequencies), y[..., width:]], axis=-1) for y in (q, k))
    read = attend(q, k, heads(v, c["num_key_value_heads"]))
    return w.linear("o_proj", read * sigmoid(both[:, :, 1].reshape(len(x), -1)))


def _olmo_hybrid(c, w, tokens):
    eps, x = c["rms_norm_eps"], w["model.embed_tokens.weight"][tokens]
    for i, kind in enumerate(c["layer_types"]):
        layer = w.below(f"model.layers.{i}")
        first, second = layer["post_attention_layernorm.weight"], layer.below("mlp")
        if kind == "linear_attention":
            x = x + _olmo_linear(c, layer.below("linear_attn"), rms(layer["input_layernorm.weight"], x, eps))
            x = x + mlp(second, rms(first, x, eps))
        else:
            x = x + rms(first, _olmo_full(c, layer.below("self_attn"), x, eps), eps)
            x = x + rms(layer["post_feedforward_layernorm.weight"], mlp(second, x), eps)
    return head(w, rms(w["model.norm.weight"], x, eps), "model.embed_tokens.weight")


def _olmo_linear(c, w, x):
    H, HV = c["linear_num_key_heads"], c["linear_num_value_heads"]
    q, k, v = (silu(w.conv(f"{n}_conv1d", w.linear(f"{n}_proj", x))) for n in "qkv")
    g, beta = decay(w, w.linear("a_proj", x)), sigmoid(w.linear("b_proj", x)) * (1 + c["linear_allow_neg_eigval"])
    read = recurrence(l2(heads(q, H)), l2(heads(k, H)), heads(v, HV), g, beta)
    read = rms(w["o_norm.weight"], read, 1e-5) * silu(heads(w.linear("g_proj", x), HV))
    return w.linear("o_proj", read.reshape(len(x), -1))


def _olmo_full(c, w, x, eps):
    H, G, theta = c["num_attention_heads"], c["num_key_value_heads"], c["rope_parameters"]["rope_theta"]
    q, k = (rms(w[f"{n}_norm.weight"], w.linear(f"{n}_proj", x), eps) for n in "qk")
    q, k, v = heads(q, H), heads(k, G), heads(w.linear("v_proj", x), G)
    if theta is not None:
        K = q.shape[-1]
        q, k = (turn(y, theta ** (-2 * np.arange(K // 2) / K)) for y in (q, k))
    return w.linear("o_proj", attend(q, k, v))


def _mamba2(c, w, tokens):
    x, N, H, eps = w["backbone.embeddings.weight"][tokens], c["state_size"], c["num_heads"], c["layer_norm_epsilon"]
    inner = H * c["head_dim"]
    for i in range(c["num_hidden_layers"]):
        layer = w.below(f"backbone.layers.{i}")
        m = layer.below("mixer")
        z, xbc, dt = np.split(
            m.linear("in_proj", rms(layer["norm.weight"], x, eps)), [inner, 2 * inner + 2 * N], axis=1
        )
        u, B, C = np.split(silu(m.conv("conv1d", xbc)), [inner, inner + N], axis=1)
        dt, u = softplus(dt + m["dt_bias"]), heads(u, H)
        y = recurrence(C[:, None], B[:, None], dt[..., None] * u, -np.exp(m["A_log"]) * dt, scale=1.0)
        y = (y + m["D"][:, None] * u).reshape(len(x), -1) * silu(z)
        x = x + m.linear("out_proj", rms(m["norm.weight"], y, eps))
    return head(w, rms(w["backbone.norm_f.weight"], x, eps), "backbone.embeddings.weight")


def _fla(c, w, tokens):
    eps, x = c["norm_eps"], w["model.embeddings.weight"][tokens]
    given = c["attn"] or []
    attention = {i: one for one in (given if isinstance(given, list) else [given]) for i in one["layers"]}
    for i in range(c["num_hidden_layers"]):
        layer = w.below(f"model.layers.{i}")
        y, own = rms(layer["attn_norm.weight"], x, eps), layer.below("attn")
        x = x + (_fla_attention(c, attention[i], own, y) if i in attention else MIXERS[c["model_type"]](c, own, y))
        x = x + mlp(layer.below("mlp"), rms(layer["mlp_norm.weight"], x, eps))
    return head(w, rms(w["model.norm.weight"], x, eps), "model.embeddings.weight")


def _fla_attention(c, own, w, x):
    K = c["hidden_size"] // own["num_heads"]
    frequencies = own["rope_theta"] ** (-2 * np.arange(K // 2) / K)
    q, k, v = (w.linear(f"{n}_proj", x).reshape(len(x), -1, K) for n in "qkv")
    return w.linear("o_proj", attend(turn(q, frequencies), turn(k, frequencies), v, own["window_size"]))


def _out(w, x, read, weight, eps, gate=silu):
    """The read [T, HV, V] after norm, gate and projection."""
    y = rms(w[weight], read, eps)
    if "g_proj.weight" in w:
        y = y * gate(w.linear("g_proj", x).reshape(y.shape))
    return w.linear("o_proj", y.reshape(len(x), -1))


def _projected(w, x, names="qkv"):
    return (w.conv(f"{n}_conv1d", w.linear(f"{n}_proj", x)) for n in names)


def _gated_deltanet(c, w, x):
    H, HV = c["num_heads"], c["num_v_heads"]
    q, k, v = (silu(y) for y in _projected(w, x))
    g, beta = decay(w, w.linear("a_proj", x)), sigmoid(w.linear("b_proj", x)) * (1 + c["allow_neg_eigval"])
    read = recurrence(l2(heads(q, H)), l2(heads(k, H)), heads(v, HV), g, beta)
    return _out(w, x, read, "o_norm.weight", c["norm_eps"])


def _delta_net(c, w, x):
    q, k, v = (heads(silu(y), c["num_heads"]) for y in _projected(w, x))
    beta = sigmoid(w.linear("b_proj", x)) * (1 + c["allow_neg_eigval"])
    return _out(w, x, recurrence(l2(q), l2(k), v, None, beta), "o_norm.weight", c["norm_eps"])


def _kda(c, w, x):
    H, HV = c["num_heads"], c["num_v_heads"]
    q, k, v = (silu(y) for y in _projected(w, x))
    f = heads(w.linear("f_proj.1", w.linear("f_proj.0", x)) + w["dt_bias"], HV)
    g, beta = -np.exp(w["A_log"])[:, None] * softplus(f), sigmoid(w.linear("b_proj", x)) * (1 + c["allow_neg_eigval"])
    read = rms(w["o_norm.weight"], recurrence(l2(heads(q, H)), l2(heads(k, H)), heads(v, HV), g, beta), c["norm_eps"])
    gate = sigmoid(w.linear("g_proj.1", w.linear("g_proj.0", x)))
    return w.linear("o_proj", read.reshape(len(x), -1) * gate)


def _activated(c, w, x):
    activation = silu if c.get("use_short_conv") and "q_conv1d.weight" in w else lambda y: y
    return (heads(activation(y), c["num_heads"]) for y in _projected(w, x))


def _fused_or_not(w):
    return "g_norm_swish_gate.weight" if "g_norm_swish_gate.weight" in w else "g_norm.weight"


def _gla(c, w, x):
    q, k, v = _activated(c, w, x)
    logit = heads(w.linear("gk_proj.1", w.linear("gk_proj.0", x)), c["num_heads"])
    return _out(w, x, recurrence(q, k, v, -softplus(-logit) / 16), _fused_or_not(w), c["norm_eps"])


def _retnet(c, w, x):
    q, k, v = _activated(c, w, x)
    K, H = q.shape[-1], c["num_heads"]
    q, k = (turn(y, 10_000.0 ** (-2 * np.arange(K // 2) / K)) for y in (q, k))
    g = np.broadcast_to(np.log(1 - 2.0 ** (-5 - np.arange(H))), (len(x), H))
    return _out(w, x, recurrence(q, k, v, g), _fused_or_not(w), c["norm_eps"])


def _linear_attn(c, w, x):
    q, k, v = _activated(c, w, x)
    phi = {"elu": lambda y: np.where(y > 0, y + 1, np.exp(np.minimum(y, 0))), "relu": lambda y: np.maximum(y, 0)}
    phi = phi.get(c["feature_map"], lambda y: y)
    return _out(w, x, recurrence(phi(q), phi(k), v), "norm.weight", c["norm_eps"])


def _hgrn2(c, w, x):
    q, f, i = (heads(y, c["num_heads"]) for y in _projected(w, x, "qfi"))
    assert not c["use_lower_bound"]
    read = recurrence(silu(q), 1 - sigmoid(f), i, -softplus(-f)).reshape(len(x), -1)
    return _out(w, x, read, "g_norm.weight", 1e-5)


def _gsa(c, w, x):
    q, k, v = (silu(y) for y in _activated(c, w, x))
    f = -softplus(-heads(w.linear("f_proj", x), c["num_heads"])) / c["gate_logit_normalizer"]
    T, H, M = f.shape
    out = np.zeros(v.shape)
    for h in range(H):
        keys, values = np.zeros((M, k.shape[-1])), np.zeros((M, v.shape[-1]))
        for t in range(T):
            kept = np.exp(f[t, h])[:, None]
            keys, values = kept * keys + (1 - kept) * k[t, h], kept * values + (1 - kept) * v[t, h]
            scores = np.exp(keys @ q[t, h])
            out[t, h] = scores / scores.sum() @ values
    return _out(w, x, silu(out).reshape(T, -1), "g_norm.weight", 1e-5)


def _mom(c, w, x):
    H, M = c["num_heads"], c["num_memories"]
    scores = np.exp(w.linear("gate", x))
    best = np.argsort(-scores, axis=1, kind="stable")[:, : c["topk"]]
    total = np.zeros((len(x), H, round(c["head_dim"] * c["expand_v"])))
    for m in range(M + c["shared_mem"]):
        shared = c["single_kv_proj"] or m == M
        own = np.arange(len(x)) if m == M else np.flatnonzero((best == m).any(axis=1))
        y = x[own]
        names = [f"shared_{n}" if shared else f"{n}_proj.{m}" for n in "kvab"]
        k, v, a, b = (w.linear(name, y) for name in names)
        q, k, v = (heads(silu(w.conv(f"{n}_conv1d", z)), H) for n, z in zip("qkv", (w.linear("q_proj", y), k, v)))
        read = recurrence(l2(q), l2(k), v, decay(w, a), sigmoid(b))
        share = 1.0 if m == M else (scores[own, m] / np.take_along_axis(scores, best, 1)[own].sum(1))[:, None, None]
        total[own] += share * read
    return _out(w, x, total, "o_norm.weight", c["norm_eps"])


MIXERS = {
    "gated_deltanet": _gated_deltanet,
    "delta_net": _delta_net,
    "kda": _kda,
    "gla": _gla,
    "retnet": _retnet,
    "linear_attn": _linear_attn,
    "hgrn2": _hgrn2,
    "gsa": _gsa,
    "mom": _mom,
}
