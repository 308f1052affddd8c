"""Tiny checkpoints of every imported architecture, and their forward pass in plain NumPy, float64, row by row.

Written from the architectures' descriptions, on the tensors' published names: nothing of engrax is used.
"""

import json
import math

import numpy as np
from safetensors.numpy import save_file

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 5.0],
}
OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 20,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "bos_token_id": 2,
}
CONFIGS = {  # name -> config.json; those of Llama's kin stand in both spellings of the rotary fields
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "vocab_size": 40,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "opt": OPT,
    "opt_after": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 8},  # the layout of OPT-350M
    "llama3": LLAMA
    | {"architectures": ["LlamaForCausalLM"], "head_dim": 8, "attention_bias": True, "mlp_bias": True}
    | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},
    "smollm": LLAMA
    | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "rope_theta": 100000}
    | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_interleaved": False, "is_llama_config": True},
    "qwen2": LLAMA
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0}
    | {"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 28},
    "mistral": LLAMA  # what transformers computes from other fields is left out: the factors of queries and keys
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7}
    | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}
    | {"max_position_embeddings": 64},
    "qwen2_window": LLAMA
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
    | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    | {"rope_parameters": LONGROPE},
    "qwen3": LLAMA
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 6, "tie_word_embeddings": True}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors that a checkpoint of `config` holds."""
    family = config["model_type"]
    return {"gpt2": _gpt2_shapes, "opt": _opt_shapes}.get(family, _llama_shapes)(config)


def _linear(name: str, outputs: int, inputs: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _gpt2_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    D, p = c["n_embd"], "transformer."
    found = {f"{p}wte.weight": (c["vocab_size"], D), f"{p}wpe.weight": (c["n_positions"], D)} | _norm(f"{p}ln_f", D)
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        found |= _norm(f"{h}ln_1", D) | _norm(f"{h}ln_2", D)
        for name, inputs, outputs in (
            ("attn.c_attn", D, 3 * D),
            ("attn.c_proj", D, D),
            ("mlp.c_fc", D, 4 * D),
            ("mlp.c_proj", 4 * D, D),
        ):
            found |= {f"{h}{name}.weight": (inputs, outputs), f"{h}{name}.bias": (outputs,)}
    return found


def _opt_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    D, E, p = c["hidden_size"], c["word_embed_proj_dim"], "model.decoder."
    found = {f"{p}embed_tokens.weight": (c["vocab_size"], E)}
    found |= {f"{p}embed_positions.weight": (c["max_position_embeddings"] + 2, D)}
    if E != D:
        found |= {f"{p}project_in.weight": (D, E), f"{p}project_out.weight": (E, D)}
    if c["do_layer_norm_before"]:
        found |= _norm(f"{p}final_layer_norm", D)
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= _linear(f"{h}self_attn.{name}", D, D)
        found |= _linear(f"{h}fc1", c["ffn_dim"], D) | _linear(f"{h}fc2", D, c["ffn_dim"])
        found |= _norm(f"{h}self_attn_layer_norm", D) | _norm(f"{h}final_layer_norm", D)
    return found


def _llama_shapes(c: dict) -> dict[str, tuple[int, ...]]:
    D, F, family = c["hidden_size"], c["intermediate_size"], c["model_type"]
    K = c.get("head_dim", D // c["num_attention_heads"])
    H, G = c["num_attention_heads"] * K, c["num_key_value_heads"] * K
    found = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
    if not c.get("tie_word_embeddings", False):
        found |= {"lm_head.weight": (c["vocab_size"], D)}
    qkv_bias = family == "qwen2" or c.get("attention_bias", False)
    for i in range(c["num_hidden_layers"]):
        h = f"model.layers.{i}."
        for name, outputs in (("q_proj", H), ("k_proj", G), ("v_proj", G)):
            found |= _linear(f"{h}self_attn.{name}", outputs, D, qkv_bias)
        found |= _linear(f"{h}self_attn.o_proj", D, H, c.get("attention_bias", False))
        if family == "qwen3":
            found |= {f"{h}self_attn.q_norm.weight": (K,), f"{h}self_attn.k_norm.weight": (K,)}
        for name, outputs, inputs in (("gate_proj", F, D), ("up_proj", F, D), ("down_proj", D, F)):
            found |= _linear(f"{h}mlp.{name}", outputs, inputs, c.get("mlp_bias", False))
        found |= {f"{h}input_layernorm.weight": (D,), f"{h}post_attention_layernorm.weight": (D,)}
    return found


def random_tensors(config: dict, dtype="float32") -> dict[str, np.ndarray]:
    """Tensors whose every value matters: vectors around 1 or 0, matrices around 0."""
    rng = np.random.default_rng(7)
    found = {}
    for name, shape in shapes(config).items():
        noise = rng.standard_normal(shape)
        scale = noise * 0.3 + (len(shape) == 1 and "norm" in name or ".ln_" in name) * (not name.endswith("bias"))
        found[name] = (scale if len(shape) == 1 else noise * 0.4).astype(dtype)
    return found


def write_checkpoint(folder, config: dict, tensors: dict[str, np.ndarray], files: int = 1) -> None:
    """config.json and the tensors, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def logits(config: dict, tensors: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The logits [T, V] of one row of tokens [T]."""
    w = {name: value.astype(np.float64) for name, value in tensors.items()}
    family = config["model_type"]
    return {"gpt2": _gpt2, "opt": _opt}.get(family, _llama)(config, w, tokens)


def _affine(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _layer_norm(w, name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def _rms_norm(weight, x, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def attend(q, k, v, window=None):
    """Causal attention of q [T, H, K] to k and v [T, G, K], joined to [T, H K]; window: tokens seen, its own too."""
    T, H, K = q.shape
    out = np.zeros_like(q)
    for t in range(T):
        for h in range(H):
            g, first = h * k.shape[1] // H, 0 if window is None else max(0, t + 1 - window)
            scores = k[first : t + 1, g] @ q[t, h] / math.sqrt(K)
            weights = np.exp(scores - scores.max())
            out[t, h] = weights / weights.sum() @ v[first : t + 1, g]
    return out.reshape(T, H * K)


def _gpt2(c, w, tokens):
    T, D, H, p = len(tokens), c["n_embd"], c["n_head"], "transformer."
    x = w[f"{p}wte.weight"][tokens] + w[f"{p}wpe.weight"][:T]
    conv = lambda name, y: y @ w[f"{name}.weight"] + w[f"{name}.bias"]  # noqa: E731
    for i in range(c["n_layer"]):
        h = f"{p}h.{i}."
        qkv = conv(f"{h}attn.c_attn", _layer_norm(w, f"{h}ln_1", x))
        q, k, v = (y.reshape(T, H, D // H) for y in np.split(qkv, 3, axis=1))
        x = x + conv(f"{h}attn.c_proj", attend(q, k, v))
        up = conv(f"{h}mlp.c_fc", _layer_norm(w, f"{h}ln_2", x))
        act = up / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        x = x + conv(f"{h}mlp.c_proj", act)
    return _layer_norm(w, f"{p}ln_f", x) @ w[f"{p}wte.weight"].T


def _opt(c, w, tokens):
    T, D, H, p = len(tokens), c["hidden_size"], c["num_attention_heads"], "model.decoder."
    first, narrow = c["do_layer_norm_before"], c["word_embed_proj_dim"] != D
    x = w[f"{p}embed_tokens.weight"][tokens]
    x = _affine(w, f"{p}project_in", x) if narrow else x
    x = x + w[f"{p}embed_positions.weight"][2 : T + 2]
    for i in range(c["num_hidden_layers"]):
        h = f"{p}layers.{i}."
        y = _layer_norm(w, f"{h}self_attn_layer_norm", x) if first else x
        q, k, v = (_affine(w, f"{h}self_attn.{n}_proj", y).reshape(T, H, D // H) for n in "qkv")
        x = x + _affine(w, f"{h}self_attn.out_proj", attend(q, k, v))
        x = x if first else _layer_norm(w, f"{h}self_attn_layer_norm", x)
        y = _layer_norm(w, f"{h}final_layer_norm", x) if first else x
        x = x + _affine(w, f"{h}fc2", np.maximum(_affine(w, f"{h}fc1", y), 0))
        x = x if first else _layer_norm(w, f"{h}final_layer_norm", x)
    x = _layer_norm(w, f"{p}final_layer_norm", x) if first else x
    x = _affine(w, f"{p}project_out", x) if narrow else x
    return x @ w[f"{p}embed_tokens.weight"].T


def _yarn(rope, K, theta, i):
    """How far a pair of channels is slowed, 0 to 1 (arXiv 2309.00071)."""
    turns = (rope.get("beta_fast", 32), rope.get("beta_slow", 1))
    old = rope.get("original_max_position_embeddings", 64)
    low, high = (K * math.log(old / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
    low, high = max(math.floor(low), 0), min(math.ceil(high), K - 1)
    return min(max((i - low) / (high - low), 0), 1)


def _magnitude(c):
    """The factor of rotated queries and keys."""
    rope, longest = c.get("rope_parameters") or {}, c["max_position_embeddings"]
    if "attention_factor" in rope:
        return rope["attention_factor"]
    if rope.get("rope_type") == "longrope":
        old = rope["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(longest / old) / math.log(old))
    return 0.1 * math.log(rope["factor"]) + 1 if rope.get("rope_type") == "yarn" else 1.0


def _frequencies(c, K):
    """Radians per token of each pair of channels."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    theta = rope.get("rope_theta", c.get("rope_theta"))
    found = []
    for i in range(K // 2):
        f = theta ** (-2 * i / K)
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "linear":
            f = f / rope["factor"]
        if kind == "yarn":
            slowed = _yarn(rope, K, theta, i)
            f = f * (1 - slowed) + f / rope["factor"] * slowed
        if kind == "longrope":  # tests read rows that are longer than the first context
            f = f / rope["long_factor"][i]
        if kind == "llama3":
            wavelength, old = 2 * math.pi / f, rope["original_max_position_embeddings"]
            if wavelength > old / rope["low_freq_factor"]:
                f = f / rope["factor"]
            elif wavelength >= old / rope["high_freq_factor"]:
                smooth = old / wavelength - rope["low_freq_factor"]
                smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
                f = (1 - smooth) * f / rope["factor"] + smooth * f
        found.append(f)
    return np.array(found)


def turn(x, frequencies):
    """x [T, H, K] with the pairs (i, i + K/2) turned by position * frequency."""
    angle = np.arange(len(x))[:, None, None] * frequencies
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1)


def _llama(c, w, tokens):
    T, D, eps = len(tokens), c["hidden_size"], c["rms_norm_eps"]
    K = c.get("head_dim", D // c["num_attention_heads"])
    frequencies, magnitude = _frequencies(c, K), _magnitude(c)
    first = {"mistral": 0, "qwen2": c.get("max_window_layers", 28)}.get(c["model_type"], 99)  # of the windows
    kinds = c.get("layer_types") or [("full", "sliding")[i >= first] + "_attention" for i in range(99)]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        h = f"model.layers.{i}."
        y = _rms_norm(w[f"{h}input_layernorm.weight"], x, eps)
        q, k, v = (_affine(w, f"{h}self_attn.{n}_proj", y).reshape(T, -1, K) for n in "qkv")
        if c["model_type"] == "qwen3":
            q, k = (_rms_norm(w[f"{h}self_attn.{n}_norm.weight"], z, eps) for n, z in (("q", q), ("k", k)))
        q, k = (magnitude * turn(z, frequencies) for z in (q, k))
        window = c["sliding_window"] if kinds[i] == "sliding_attention" else None
        x = x + _affine(w, f"{h}self_attn.o_proj", attend(q, k, v, window))
        y = _rms_norm(w[f"{h}post_attention_layernorm.weight"], x, eps)
        gate = _affine(w, f"{h}mlp.gate_proj", y)
        x = x + _affine(w, f"{h}mlp.down_proj", gate / (1 + np.exp(-gate)) * _affine(w, f"{h}mlp.up_proj", y))
    x = _rms_norm(w["model.norm.weight"], x, eps)
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
