"""Every part of the Titans memory lowers the perplexity; momentum and forgetting do most.

    engrax reproduce titans_ablation --preset full          # three variants, 2 M tokens
    engrax compare titans_ablation                          # all ten, 0.4 M tokens

The paper's ablation (arXiv 2501.00663, table 5), on real text at the size of a CPU. Ten variants of two layers (the
memory of LMM has depth 2), at three learning rates, the best with three seeds; a run of `engrax compare` takes one to
two minutes of one core. docs/titans.md has its table.
"""

import dataclasses

from engrax.configs.claims.forgetting_recall import RULE
from engrax.data import StdlibText
from engrax.evals import Claim, Comparison, claims
from engrax.layers import AttentionConfig, MACConfig, MAGConfig, MALConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig

PAPER = {  # language-modelling perplexity of table 5
    "LMM": 27.01,
    "MAC": 26.67,
    "MAG": 25.70,
    "MAL": 25.91,
    "linear memory": 28.49,
    "no convolution": 28.73,
    "no momentum": 28.98,
    "no forgetting": 29.04,
    "no persistent tokens": 27.63,
}
MEMORY = TitansConfig(heads=4, head_dim=32, hidden=64, chunk_size=32, persistent_tokens=4)


def experiment(mixer) -> Experiment:
    """The experiment with this mixer in every layer."""
    return Experiment(
        model=LanguageModelConfig(vocab_size=256, dim=128, mixers=(mixer,), repeat=2),
        data=StdlibText(seq_len=256),
        steps=200,
        batch_size=8,
        optimizer=AdamWConfig(schedule=CosineConfig(warmup_steps=50)),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        eval=EvalConfig(every=100, batches=16),
        log=LogConfig(every=50),
    )


def comparison(
    make=experiment,
    memory: TitansConfig = MEMORY,
    learning_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3),
) -> Comparison:
    """The comparison: the memory alone first, which the others are held to; `make` says what they are trained on."""
    attention = AttentionConfig(window=memory.chunk_size, conv_width=4, persistent_tokens=4)
    change = lambda **fields: dataclasses.replace(memory, **fields)  # noqa: E731
    mixers = {
        "LMM": memory,
        "MAC": MACConfig(memory=memory, chunk_size=memory.chunk_size),
        "MAG": MAGConfig(memory=memory, attention=attention),
        "MAL": MALConfig(memory=memory, attention=attention),
        "linear memory": change(depth=1),
        "no convolution": change(conv_width=1),
        "no momentum": change(momentum=False),
        "no forgetting": change(forgetting=False),
        "no persistent tokens": change(persistent_tokens=0),
        "depth 3": change(depth=3, max_lr=0.5 / 32),  # that of the others, which is twice its default
    }
    full = PAPER["LMM"]
    found = [
        Claim(*((name, "LMM") if value < full else ("LMM", name)), f"table 5: {min(value, full)} < {max(value, full)}")
        for name, value in PAPER.items()
        if name != "LMM"
    ]
    found.append(Claim("depth 3", "LMM", "figures 7 and 8: depth lowers perplexity"))
    return Comparison(
        experiments={name: make(mixer) for name, mixer in mixers.items()},
        learning_rates=learning_rates,
        claims=tuple(found),
    )


def card() -> claims.Card:
    """The claims on momentum and forgetting; the quick preset trains the first pair for 20 steps."""
    few = {"batch_size": 4, "data__validation_fraction": 0.002}  # scoring would take longer than training
    three = claims.part(comparison(), ("LMM", "no momentum", "no forgetting"), steps=1000, seeds=3, eval__every=500)
    return claims.Card(
        paper="arXiv 2501.00663, table 5, perplexity: the memory alone (LMM) 27.01, without momentum 28.98, without "
        "forgetting 29.04.",
        here="Source text of Python's standard library, byte by byte; two layers of width 128 with MLPs, memories of "
        "4 heads 32 -> 64 -> 32, chunks of 32 tokens, 1,000 steps of 8 rows of 256 bytes, 2 M tokens (quick: 20 "
        "steps, one pair).",
        rule=RULE,
        quick=claims.Compared(claims.part(comparison(), ("LMM", "no momentum"), steps=20, **few)),
        full=claims.Compared(three),
    )
