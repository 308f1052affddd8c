"""Draws docs/schedules.png, all learning rates over one training: `python benchmarks/schedules_figure.py [FILE]`."""

import sys

import jax
import jax.numpy as jnp

from engrax.train import (
    ConstantConfig,
    CosineConfig,
    InfiniteConfig,
    InverseRootConfig,
    LinearConfig,
    WSDConfig,
    WSDSConfig,
)

STEPS = 1000
SCHEDULES = (
    ConstantConfig(),
    CosineConfig(),
    LinearConfig(),
    InverseRootConfig(),
    WSDConfig(),
    WSDSConfig(ends=(250, 500)),
    InfiniteConfig(),
    InfiniteConfig(anneal_steps=150),
)
TITLES = {5: "wsd_s, ends=(250, 500)", 7: "infinite, anneal_steps=150"}


def main(path: str) -> None:
    """Writes the plot, a panel per schedule."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    steps = jnp.arange(STEPS)
    for n, (axes, config) in enumerate(zip(figure.subplots(2, 4, sharex=True, sharey=True).flat, SCHEDULES)):
        axes.plot(steps, jnp.broadcast_to(jax.vmap(config.rate(1.0, STEPS))(steps), STEPS), color="#1f5fa8")
        axes.set_title(TITLES.get(n, config.registered_name), fontsize=10)
        axes.set_ylim(0, 1.05)
        axes.grid(alpha=0.3)
    figure.supxlabel("step", fontsize=10)
    figure.supylabel("learning rate / peak", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["docs/schedules.png"]))
