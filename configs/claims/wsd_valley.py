"""A constant learning rate makes progress that shows only when it decays: the river valley.

engrax reproduce wsd_valley --preset full
engrax compare wsd_valley --steps 1200          # with other settings
"""

import dataclasses

from engrax.configs.claims import titans_ablation
from engrax.configs.claims.forgetting_recall import RULE
from engrax.evals import Claim, Comparison, claims
from engrax.layers import MIXERS
from engrax.train import AdamWConfig, ConstantConfig, CosineConfig, WSDConfig

WARMUP = 50


def comparison() -> Comparison:
    """The comparison; the first never decays."""
    base = titans_ablation.experiment(MIXERS["gated_deltanet"](heads=4, head_dim=32, value_dim=32, conv_width=4))
    schedules = {
        "constant": ConstantConfig(warmup_steps=WARMUP),
        "wsd": WSDConfig(warmup_steps=WARMUP, decay_fraction=0.2),
        "cosine": CosineConfig(warmup_steps=WARMUP),
    }
    source = "arXiv 2410.05192"
    return Comparison(
        experiments={
            name: dataclasses.replace(base, steps=600, optimizer=AdamWConfig(schedule=schedule))
            for name, schedule in schedules.items()
        },
        learning_rates=(2e-3, 4e-3, 8e-3),
        claims=(
            Claim("wsd", "constant", f"{source}: the decay brings the loss down to the river"),
            Claim("wsd", "cosine", f"{source}: at a compute that was not fixed beforehand, at least as low"),
        ),
    )


def card() -> claims.Card:
    """The claims; the quick preset trains the first pair for 20 steps."""
    quick = claims.part(comparison(), ("constant", "wsd"), steps=20, batch_size=4)
    return claims.Card(
        paper="arXiv 2410.05192: at a constant rate the parameters oscillate between the walls of a valley while they "
        "move along its river; a short decay lets them down to it, and the loss falls sharply, to that of a cosine "
        "schedule or below.",
        here="Source text of Python's standard library, byte by byte; gated DeltaNet, two layers of width 128 with "
        "MLPs, 600 steps of 8 rows of 256 bytes; constant after the warmup, the same with a decay in the last fifth, "
        "and cosine (quick: 20 steps, the first two).",
        rule=RULE,
        quick=claims.Compared(quick),
        full=claims.Compared(comparison()),
    )
