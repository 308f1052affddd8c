"""What mixers recall at about the same bytes of state: attention, states, windows, delta rules, mixtures.

    engrax reproduce mqar_mixers --preset full
    engrax compare mqar_mixers --steps 1600          # with other settings

Two layers of width 64 without MLPs, the same short convolution for all, states of 1960 to 2115 numbers a layer, tails
of the convolution apart; mixtures hold as much in all their memories together. Attention has a window whose cache is as
large, and the whole row besides: the ceiling.

A run takes a minute of one core. The vocabulary is small for that: with 256 tokens a gated delta rule had not begun to
recall after 600 steps of 32 rows, with 64 it has. The tokens between the questions are drawn from all 64, keys among
them, which is some noise for a memory that overwrites. docs/recall.md has a full run.
"""

from engrax.configs.claims.forgetting_recall import RULE
from engrax.data import MQAR
from engrax.evals import Claim, Comparison, claims
from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig

CONV = dict(conv_width=4)
SQUARE = dict(heads=2, head_dim=32, value_dim=32) | CONV  # 2 x 32 x 32 = 2048 numbers
MIXTURE = dict(heads=2, head_dim=14, value_dim=14) | CONV  # 5 memories (4 and the shared one) of 2 x 14 x 14
MLP = dict(heads=2, head_dim=16, hidden=11, chunk_size=16) | CONV  # of depth 2: weights, momentum and anchor


def mixers() -> dict:
    """The mixers by their names in the table."""
    make = lambda name, **settings: MIXERS[name](**settings)  # noqa: E731
    return {
        "linear_attention": make("linear_attention", **SQUARE),
        "attention, all": make("attention", heads=2, head_dim=32, **CONV),
        "attention, window": make("attention", heads=2, head_dim=32, window=17, **CONV),
        "retnet": make("retnet", **SQUARE),
        "lightning": make("lightning", **SQUARE),
        "gla": make("gla", **SQUARE),
        "mamba2": make("mamba2", heads=1, value_heads=2, head_dim=32, value_dim=32, **CONV),
        "hgrn2": make("hgrn2", **SQUARE),
        "deltanet": make("deltanet", **SQUARE),
        "gated_deltanet": make("gated_deltanet", **SQUARE),
        "kda": make("kda", **SQUARE),
        "gsa": make("gsa", heads=2, head_dim=32, slots=16, **CONV),
        "based": make("based", heads=2, head_dim=7, value_dim=28, **CONV),
        "rebased": make("rebased", heads=2, head_dim=8, value_dim=28, **CONV),
        "titans": make("titans", **MLP),
        "ttt_linear": make("ttt_linear", heads=2, head_dim=22, chunk_size=16, **CONV),
        "mom of gla": make("mom", base=make("gla", **MIXTURE)),  # of a gated delta rule a run takes three minutes
    }


def experiment(mixer) -> Experiment:
    """The experiment with this mixer in both layers."""
    return Experiment(
        model=LanguageModelConfig(vocab_size=64, dim=64, mixers=(mixer,), repeat=2, mlp_hidden=0),
        data=MQAR(seq_len=128, num_pairs=16, vocab_size=64),
        steps=800,
        batch_size=16,
        optimizer=AdamWConfig(weight_decay=0.01, schedule=CosineConfig(warmup_steps=100)),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        eval=EvalConfig(every=50, batches=4),
        log=LogConfig(every=100),
    )


def comparison() -> Comparison:
    """The comparison; the first, which the others are held to, has neither gates nor a delta rule."""
    zoology = "arXiv 2312.04927: linear attention recalls less than attention at equal width"
    delta = "arXiv 2406.06484: the delta rule recalls more than gates at equal state"
    return Comparison(
        experiments={name: experiment(mixer) for name, mixer in mixers().items()},
        learning_rates=(3e-3, 1e-2, 3e-2),
        claims=(
            Claim("attention, all", "linear_attention", zoology),
            Claim("based", "attention, window", "arXiv 2402.18668: recalls more at equal state than a window"),
            Claim("deltanet", "gla", delta),
            Claim("gated_deltanet", "mamba2", "arXiv 2412.06464: gated delta rule above Mamba-2 on recall"),
            Claim("mom of gla", "gla", "arXiv 2502.13685: a mixture above one memory; here at equal total state"),
        ),
    )


def card() -> claims.Card:
    """The claims; the quick preset trains three mixers for 30 steps."""
    few = ("linear_attention", "attention, all", "deltanet")
    return claims.Card(
        paper="arXiv 2312.04927 (Zoology): linear attention recalls less than attention. arXiv 2402.18668 (Based): "
        "more than a window of its size. arXiv 2406.06484: a delta rule more than gates. arXiv 2412.06464: a gated "
        "delta rule more than Mamba-2. arXiv 2502.13685: a mixture more than one memory.",
        here="MQAR with 128 tokens and 16 pairs, two layers of width 64 without MLPs, states of 1960 to 2115 numbers a "
        "layer, 800 steps of 16 rows (quick: 30 steps, three mixers).",
        rule=RULE,
        quick=claims.Compared(claims.part(comparison(), few, steps=30)),
        full=claims.Compared(comparison()),
    )
