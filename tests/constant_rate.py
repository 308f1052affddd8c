"""mqar_attention at a constant learning rate: a config file for tests that continue a run for more steps."""

import dataclasses

from engrax.configs import mqar_attention
from engrax.train import AdamWConfig, ConstantConfig, Experiment


def config() -> Experiment:
    """The experiment."""
    optimizer = AdamWConfig(learning_rate=5e-3, weight_decay=0.01, schedule=ConstantConfig(warmup_steps=2))
    return dataclasses.replace(mqar_attention.config(), optimizer=optimizer)
