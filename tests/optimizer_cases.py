"""Settings of every optimizer and parameters of every kind, for the tests of optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.train import (
    AdafactorConfig,
    AdamWConfig,
    ConstantConfig,
    FRUGALConfig,
    GaLoreConfig,
    LionConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    ScheduleFreeConfig,
    SGDConfig,
    SPAMConfig,
)

PLAIN = dict(learning_rate=1.0, schedule=ConstantConfig(warmup_steps=0), weight_decay=0.0)
SMALL = {  # every optimizer at settings that change something in a few steps of a small model
    "adafactor": AdafactorConfig(**PLAIN, least_factored=4),
    "adamw": AdamWConfig(**PLAIN),
    "frugal": FRUGALConfig(**PLAIN, density=0.5, gap=3),
    "galore": GaLoreConfig(**PLAIN, rank=2, gap=3),
    "lion": LionConfig(**PLAIN),
    "muon": MuonConfig(**PLAIN),
    "natural_galore": NaturalGaLoreConfig(**PLAIN, rank=2, gap=3, history=4),
    "schedule_free": ScheduleFreeConfig(**PLAIN),
    "sgd": SGDConfig(**PLAIN),
    "spam": SPAMConfig(**PLAIN, gap=4, warmup=2, settle=2),
}
SHAPES = {  # name: (axes, shape, role, further metadata)
    "wide": (("layers", "embed", "mlp"), (2, 6, 10), "matrix", {}),
    "tall": (("layers", "mlp", "embed"), (2, 9, 5), "matrix", {}),
    "qkv": (("embed", "heads"), (4, 14), "matrix", {"widths": (4, 4, 6)}),
    "memories": (("memory", "embed", "heads"), (3, 4, 5), "matrix", {}),
    "heads_apart": ((None, None, None), (4, 2, 3), "matrix", {}),
    "table": (("vocab", "embed"), (7, 4), "embedding", {}),
    "taps": (("layers", "conv", "channels"), (2, 4, 3), "convolution", {}),
    "rates": (("layers", "heads"), (2, 5), "gate", {}),
}
STEPS = 8


def draw(seed):
    rng = np.random.default_rng(seed)
    return nnx.State(
        {
            name: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=axes, role=role, **more)
            for name, (axes, shape, role, more) in SHAPES.items()
        }
    )


PARAMS, GRADS = draw(0), [draw(1 + i) for i in range(STEPS)]
GRADS[6] = jax.tree.map(lambda g: 1000 * g, GRADS[6])  # a spike
