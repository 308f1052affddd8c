"""A trainer whose loss goes wrong where the batch says so, and data without files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from engrax.data import StdlibText
from engrax.layers import LinearAttentionConfig
from engrax.models import LanguageModelConfig
from engrax.tests.experiments import tiny
from engrax.train import AdamWConfig, CheckpointConfig, ConstantConfig, GuardConfig
from engrax.train.trainer import Trainer

FAULTS = {"forward": 1, "gradient": 2, "memory": 3, "spike": 4}  # NaN, NaN, NaN, a gradient of 1000 times
GUARD = GuardConfig(action="skip", sigma=6.0, warmup=3, horizon=16, limit=2)
ROWS, TOKENS = 8, 16


def experiment(**fields):
    """A linear attention on rows of 16 bytes, whose memory is carried from batch to batch."""
    mixer = LinearAttentionConfig(heads=1, head_dim=8)
    model = LanguageModelConfig(vocab_size=256, dim=16, mixers=(mixer,), repeat=1, mlp_hidden=16)
    fields = dict(carry_memory=True, guard=GUARD, steps=10, checkpoint=CheckpointConfig(every=4, keep_last=9)) | fields
    return tiny(
        model=model,
        data=StdlibText(seq_len=TOKENS),
        batch_size=ROWS,
        optimizer=AdamWConfig(learning_rate=1e-2, schedule=ConstantConfig(warmup_steps=2)),
        **fields,
    )


@jax.custom_vjp
def scaled_gradient(x, factor):
    """x, with the gradient times factor."""
    return x


scaled_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


class Faulty(Trainer):
    """Trains like Trainer, but batch["fault"] [B], numbers of FAULTS, says what goes wrong in a row."""

    def make_loss(self, place=None):
        """See `Trainer`."""
        sound = super().make_loss(place)

        def loss(params, batch, memory):
            fault = jnp.max(batch["fault"])
            factor = jnp.where(fault == 2, jnp.nan, jnp.where(fault == 4, 1000.0, 1.0))
            params = jax.tree.map(lambda x: scaled_gradient(x, factor), params)
            batch = {name: x for name, x in batch.items() if name != "fault"}
            total, (sums, memory) = sound(params, batch, memory)
            bad = jnp.where(fault == 1, jnp.nan, 0.0)
            sums = jax.tree.map(lambda x: x + bad, sums)
            wrong = jnp.where(fault == 3, jnp.nan, 0.0)
            memory = jax.tree.map(
                lambda x: x + wrong.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, memory
            )
            return total + bad, (sums, memory)

        return loss


@dataclasses.dataclass
class Rows:
    """Endless batches; that of step n has the fault `faults[n]` in one row."""

    faults: dict[int, str | None] = dataclasses.field(default_factory=dict)
    step: int = 0

    def __next__(self):
        self.step += 1
        rng = np.random.default_rng(self.step)
        tokens = rng.integers(97, 105, (ROWS, TOKENS + 1)).astype(np.int32)
        fault = np.zeros(ROWS, np.int32)
        fault[3] = FAULTS.get(self.faults.get(self.step), 0)
        ids = np.zeros((ROWS, TOKENS), np.int32)
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ids, "fault": fault}

    def get_state(self):
        """The step."""
        return {"step": self.step}

    def set_state(self, position):
        """Goes on after a step."""
        self.step = position["step"]


def identity_of(trainer, faults, steps=8):
    """For every fault: (the leaves after a run with it at step 6, those of a run in which step 6 is the identity)."""
    data, state = Rows(), trainer.init_state()
    for _ in range(5):
        state, _ = trainer.train_step(state, trainer.put(next(data)))
    before, found = jax.device_get(state), {}
    for fault in (None, *faults):
        data = Rows({6: fault}, step=5)
        state = jax.device_put(before, trainer.state_shardings)
        for step in range(6, steps + 1):
            batch = trainer.put(next(data))
            if fault is None and step == 6:
                state = state | {"step": trainer.advance(state["step"])}
            else:
                state, values = trainer.train_step(state, batch)
            if step == 6 and fault:
                found[fault] = {"verdict": int(values["verdict"]), "moved": jax.device_get(state), "before": before}
        end = jax.device_get(state)
        if fault is None:
            wanted = end
        else:
            found[fault] |= {"end": end, "wanted": wanted}
    return found


def same(one, other):
    """Whether two trees have equal bits."""
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
