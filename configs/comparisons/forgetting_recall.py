"""Recall of keys that are bound again: forgetting MQAR with 8 pairs and 4 updates in 64 tokens (arXiv 2312.04927).

    engrax compare forgetting_recall

Two layers of width 32 without MLPs, the same short convolution for all and equal states: 2 x 16 x 16 numbers a layer
(the additive memory has 32 more, its normaliser). A delta rule writes over a key's old value; an additive memory keeps
both. docs/task_verdicts.md has the table, and the accuracies of updated and of untouched keys.
"""

from engrax.data import DataConfig, ForgettingMQAR
from engrax.evals import Claim, Comparison
from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig

STATE = dict(heads=2, head_dim=16, value_dim=16, conv_width=4, chunk_size=32)


def experiment(mixer, data: DataConfig, steps: int, batch_size: int = 16) -> Experiment:
    """The experiment with this mixer in both layers, on this task."""
    return Experiment(
        model=LanguageModelConfig(vocab_size=data.vocab_size, dim=32, mixers=(mixer,), repeat=2, mlp_hidden=0),
        data=data,
        steps=steps,
        batch_size=batch_size,
        optimizer=AdamWConfig(weight_decay=0.01, schedule=CosineConfig(warmup_steps=50)),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        eval=EvalConfig(every=100, batches=4),
        log=LogConfig(every=100),
    )


def comparison() -> Comparison:
    """The comparison; the first, which the others are held to, adds."""
    data = ForgettingMQAR(seq_len=64, num_pairs=8, num_updates=4, vocab_size=64)
    mixers = {name: MIXERS[name](**STATE) for name in ("linear_attention", "gla", "deltanet", "gated_deltanet")}
    return Comparison(
        experiments={name: experiment(mixer, data, 600) for name, mixer in mixers.items()},
        learning_rates=(3e-3, 1e-2, 3e-2),
        claims=(
            Claim("deltanet", "linear_attention", "arXiv 2102.11174: the delta rule replaces a key's value"),
            Claim("gated_deltanet", "gla", "arXiv 2412.06464: the delta rule updates what a gate can only forget"),
        ),
    )
