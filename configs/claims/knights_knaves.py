"""A model that has memorized puzzles solves them, but not the same ones with a statement changed.

engrax reproduce knights_knaves --preset full
"""

from engrax.data import KnightsAndKnaves
from engrax.evals import claims
from engrax.evals.claims import Contrast, Measured
from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig

NAME = "gated_deltanet"
SPLITS = ("trained", "reordered", "perturbed", "new")


def experiment(steps: int) -> Experiment:
    """A small model on 200 puzzles, which it can memorize."""
    data = KnightsAndKnaves(seq_len=21, people=3, train_examples=200, validation_examples=200, validation="trained")
    mixer = MIXERS[NAME](heads=4, head_dim=16, value_dim=16, conv_width=4, chunk_size=32)
    return Experiment(
        model=LanguageModelConfig(vocab_size=data.vocab_size, dim=64, mixers=(mixer,), repeat=2),
        data=data,
        steps=steps,
        batch_size=20,
        optimizer=AdamWConfig(weight_decay=0.0, schedule=CosineConfig(warmup_steps=max(1, steps // 10))),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        eval=EvalConfig(every=0),
        log=LogConfig(every=100),
    )


def solved(directory) -> dict[str, float]:
    """The share of puzzles of every kind that a run solves for all people."""
    shares = {}
    for name in SPLITS:
        rows, right, _ = claims.answers(directory, {"validation": name})
        puzzles = rows.labelled.any(axis=1)
        shares[name] = float((right == rows.labelled).all(axis=1)[puzzles].mean())
    return shares


def measured(steps: int, seeds: int) -> Measured:
    """The experiment with its contrasts."""
    contrasts = (
        Contrast("trained puzzles are solved more often than perturbed ones", (NAME, "trained"), (NAME, "perturbed")),
        Contrast("trained puzzles are solved more often than new ones", (NAME, "trained"), (NAME, "new")),
    )
    return Measured({NAME: experiment(steps)}, solved, contrasts, (1e-3, 3e-3, 1e-2), seeds, "share of puzzles")


def card() -> claims.Card:
    """The claims; the quick preset trains for 60 steps."""
    return claims.Card(
        paper="arXiv 2410.23123: models tuned on knights-and-knaves puzzles solve nearly all of them, and far fewer "
        "of the same puzzles after one statement was changed: they have memorized (models that reason lose nothing).",
        here="200 puzzles of 3 people as tokens; two layers of width 64 of gated DeltaNet, 1,000 steps of 20 puzzles. "
        "The same puzzles as trained, in another order, with a statement changed and another solution, and new ones; "
        "all people of a puzzle must be right (quick: 60 steps).",
        rule="Three learning rates with seed 0, the best on the trained puzzles judged with seeds 1 to 3. Reproduced "
        "where the 95 % interval of the difference by seed (Student's t, corrected after Holm) lies above 0, "
        "contradicted where it lies below 0, else inconclusive.",
        quick=measured(60, 1),
        full=measured(1000, 3),
    )
