"""HMT's recall gives distant segments a short path for the gradient; RMT's passes through every segment between.

    engrax reproduce hmt_gradient --preset full

Nothing is trained. Every segment has tokens of its own, so the rows of the (untied) embedding tell the gradient of the
last segment's loss by the segment that it reached.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax import models
from engrax.evals import claims, plots
from engrax.evals.claims import Contrast, Found
from engrax.layers import AttentionConfig
from engrax.models import HMTConfig, LanguageModelConfig, RMTConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.train import objective

SEGMENT, SYMBOLS, ROWS = 16, 8, 4


def card() -> claims.Card:
    """The claim; the quick preset has 6 segments and 3 seeds."""
    return claims.Card(
        paper="arXiv 2405.06067: RMT gets worse when it is unrolled over more than about 5 segments, HMT improves up "
        "to 15, because its recall attends to every past memory directly (from secondary sources).",
        here="Both around the same backbone (two layers of width 32, segments of 16 tokens) with new parameters. The "
        "norm of the gradient of the last segment's loss by the first segment's embeddings, divided by that by the "
        "last but two's; its logarithm to base 10 (quick: 6 segments, 3 seeds; full: 16 segments, 10 seeds).",
        rule="Over the seeds of parameters and tokens: reproduced where the 95 % interval of HMT's mean logarithm "
        "minus RMT's (Welch's t) lies above 0, contradicted where it lies below 0, else inconclusive. It says how "
        "gradients pass through new models, not what training makes of it.",
        quick=functools.partial(run, segments=6, seeds=3),
        full=functools.partial(run, segments=16, seeds=10),
    )


def run(folder, options, *, segments: int, seeds: int) -> Found:
    """The gradients of all seeds and their contrast."""
    attention = AttentionConfig(heads=2, head_dim=16, capacity=4096)
    layout = BlockStyleConfig(tied=False)
    backbone = LanguageModelConfig(
        vocab_size=segments * SYMBOLS, dim=32, mixers=(attention,), repeat=2, mlp_hidden=64, layout=layout
    )
    shared = dict(backbone=backbone, segment_length=SEGMENT)
    configs = {
        "HMT": HMTConfig(**shared, summary_tokens=8, sensory_tokens=4, cache_size=segments, recall_width=32),
        "RMT": RMTConfig(**shared, memory_tokens=4),
    }
    norms = {name: [reached(config, segments, seed) for seed in range(seeds)] for name, config in configs.items()}
    by = {name: [{"log10": float(np.log10(x[0] / x[-3]))} for x in each] for name, each in norms.items()}
    contrast = Contrast("HMT's gradient falls less with the distance than RMT's", ("HMT", "log10"), ("RMT", "log10"))
    lines = ["| | gradient by the first segment / by the last but two, log10 |", "| --- | --- |"]
    for name, each in by.items():
        found, _ = claims.t_interval([np.array([one["log10"] for one in each])])
        lines.append(f"| {name} | {found.value:.2f} [{found.low:.2f}, {found.high:.2f}] |")
    plot = _plot({name: np.exp(np.mean(np.log(each), axis=0)) for name, each in norms.items()})
    findings = claims.contrasted([contrast], by, seeds)
    data = {"norms": {name: np.asarray(each).tolist() for name, each in norms.items()}, "segments": segments}
    return Found(findings, "\n".join(lines) + "\n", {"Gradient by segment": plot}, data)


def reached(config, segments: int, seed: int) -> np.ndarray:
    """The norm [segments] of the gradient of the last segment's loss by the embeddings of each segment's tokens."""
    rng = np.random.default_rng(seed)
    own = rng.integers(0, SYMBOLS, (ROWS, segments, SEGMENT)) + SYMBOLS * np.arange(segments)[:, None]
    tokens = own.reshape(ROWS, -1).astype(np.int32)
    targets = np.full_like(tokens, -1)
    targets[:, -SEGMENT:-1] = tokens[:, -SEGMENT + 1 :]
    graph, params = nnx.split(models.build(config, rngs=nnx.Rngs(seed)), nnx.Param)
    found = _gradient(graph, params, tokens, targets).reshape(segments, -1)
    return np.linalg.norm(np.asarray(found, np.float64), axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(graph, params, tokens, targets):
    """The gradient of the loss by the embedding, [vocabulary, width]."""

    def loss(params):
        return jnp.sum(objective.score(nnx.merge(graph, params), {"tokens": tokens, "targets": targets}).nats)

    return jax.grad(loss)(params)["backbone"]["embedding"].get_value()


def _plot(norms: dict[str, np.ndarray]) -> bytes:
    with plots.canvas("Gradient of the last segment's loss") as drawn:
        axis = drawn.axes[0, 0]
        for colour, (name, values) in zip(plots.SERIES, norms.items()):
            axis.plot(np.arange(len(values), 0, -1) - 1, values, "o-", color=colour, label=name, markersize=4)
        axis.set(xlabel="segments back", ylabel="norm, geometric mean of the seeds", yscale="log")
        axis.legend()
    return drawn.png
