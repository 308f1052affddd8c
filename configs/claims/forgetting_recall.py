"""A delta rule recalls keys that are bound again; an additive memory keeps both values.

    engrax reproduce forgetting_recall --preset full
    engrax compare forgetting_recall --steps 1200          # with other settings

Two layers of width 32 without MLPs, the same short convolution for all and equal states: 2 x 16 x 16 numbers a layer
(the additive memory has 32 more, its normaliser). A delta rule writes over a key's old value; an additive memory keeps
both. docs/task_verdicts.md has a full run.
"""

from engrax.data import DataConfig, ForgettingMQAR
from engrax.evals import Claim, Comparison, claims
from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig

STATE = dict(heads=2, head_dim=16, value_dim=16, conv_width=4, chunk_size=32)
RULE = (
    "Three learning rates with seed 0, the best judged with seeds 1 to 3 on the same rows. A claim is reproduced "
    "where the 95 % interval of its difference (bootstrap over seeds and rows, corrected for the number of claims "
    "after Holm) lies above 0, contradicted where it lies below 0, else inconclusive."
)


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


def by_kind(directory) -> dict[str, float]:
    """The accuracy of a run on every kind of question."""
    rows, right, experiment = claims.answers(directory)
    names, index = experiment.data.slices(rows.arrays())
    of = {name: (index == i) & rows.labelled for i, name in enumerate(names)}
    return {name: float(right[chosen].mean()) for name, chosen in of.items() if chosen.any()}


def card() -> claims.Card:
    """The claim; the quick preset trains the first pair for 60 steps."""
    title = "Accuracy of the keys that were bound again and of the others:"
    pair = ("linear_attention", "deltanet")
    return claims.Card(
        paper="arXiv 2102.11174 replaces the additive write of linear attention by a delta rule, which removes the old "
        "value of a key; arXiv 2412.06464 adds a gate. Forgetting MQAR is from the code of arXiv 2312.04927.",
        here="Forgetting MQAR, 8 pairs and 4 updates in 64 tokens; two layers of width 32 without MLPs, a short "
        "convolution for all, states of 2 x 16 x 16 numbers a layer, 600 steps of 16 rows (quick: 60 steps, one pair).",
        rule=RULE,
        quick=claims.Compared(claims.part(comparison(), pair, steps=60), by_kind, title),
        full=claims.Compared(comparison(), by_kind, title),
    )
