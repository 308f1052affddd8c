"""What tests of meshes run in processes with several devices: small models of every family, steps, collectives."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig
from engrax.tests.experiments import tiny
from engrax.train import Experiment, ParallelConfig
from engrax.train.trainer import Trainer

_DELTA = MIXERS["gated_deltanet"](heads=4, head_dim=4, value_dim=6, chunk_size=8)
FAMILIES = {
    "attention": MIXERS["attention"](heads=4, head_dim=4, window=8, conv_width=4, persistent_tokens=2, bias="all"),
    "linear": MIXERS["mamba2"](heads=4, value_heads=4, head_dim=4, value_dim=6, chunk_size=8),  # one norm of all heads
    "delta": _DELTA,
    "test_time": MIXERS["titans_mal"](
        memory=MIXERS["titans"](heads=4, head_dim=4, hidden=6, chunk_size=8, persistent_tokens=3),
        attention=MIXERS["attention"](heads=4, head_dim=4, window=6),
    ),
    "routed": MIXERS["mom"](base=_DELTA, memories=3, top_k=2),
    "hopfield": MIXERS["hopfield"](heads=4, head_dim=4),  # placed by the compiler
}
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
LENGTH, DIM = 24, 16  # tokens, width


def experiment(*families: str, parallel: dict[str, Any], accumulate: int = 1, **fields: Any) -> Experiment:
    """An experiment whose pattern has a block of each family."""
    mixers = tuple(FAMILIES[name] for name in families)
    model = LanguageModelConfig(vocab_size=32, dim=DIM, mixers=mixers, repeat=2, mlp_hidden=20)
    e = tiny(model=model, parallel=ParallelConfig(**parallel), **{"batch_size": 16} | fields)
    return dataclasses.replace(e, optimizer=dataclasses.replace(e.optimizer, accumulate=accumulate))


def run(e: Experiment, steps: int = 3, wide: bool = False) -> dict[str, Any]:
    """{"losses", "held"}: the losses of the first steps, in float64 if `wide`, and the bytes of every leaf of the
    state: [[all, on one device], ...] by part."""
    e = dataclasses.replace(e, compute_dtype="float64") if wide else e
    trainer = Trainer(e, tuple(jax.devices()[: math.prod(e.parallel.mesh_shape(len(jax.devices())))]))
    state, data, losses = trainer.init_state(), trainer.loader("train"), []
    if wide:
        state = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state)
    held = {part: [[x.nbytes, x.addressable_shards[0].data.nbytes] for x in jax.tree.leaves(state[part])]
            for part in ("params", "opt_state")}  # fmt: skip
    for _ in range(steps):
        state, values = trainer.train_step(state, trainer.put(next(data)))
        losses.append(float(values["loss"]))
    return {"losses": losses, "held": held}


def compiled(e: Experiment) -> Any:
    """The compiled training step."""
    trainer = Trainer(e)
    return trainer.train_step.lower(trainer.abstract_state(), trainer.put(next(trainer.loader("train")))).compile()


def collectives(program: Any) -> list[tuple[str, list[int]]]:
    """(kind, shape) of every array that a collective of a compiled program moves."""
    moved = []
    for line in program.as_text().splitlines():
        call = re.search(rf"= (\(?[^=]*?) ({KINDS})(-start)?\(", line)
        for shape in re.findall(r"\w+\[([\d,]*)\]", call.group(1)) if call else ():
            moved.append((call.group(2), [int(n) for n in shape.split(",") if n]))
    return moved
