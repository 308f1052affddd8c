"""A training loop for scripts that train many small models in a few programs: the optimizer, its schedule and the
clipping are those of `engrax.train`, the loss is the script's own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Float

from engrax.train import OptimizerConfig
from engrax.train.optimizers.base import build
from engrax.train.train_step import apply_gradient

State = dict[str, Any]  # {"params", "opt_state"}


@dataclasses.dataclass(frozen=True)
class SmallTraining:
    """Minimises loss(params, batch) in `steps` steps. The parameters have roles, as `engrax.models.build` gives them.

    `rate`, a factor of the optimizer's learning rate, may be traced: one program then serves all learning rates.
    """

    optimizer: OptimizerConfig
    steps: int
    loss: Callable[[Any, Any], Float[Array, ""]]

    def start(self, params: Any) -> State:
        """The state before the first step."""
        return {"params": params, "opt_state": self._rule(params, 1.0).init(params)}

    def run(self, state: State, batches: Any, rate: Any = 1.0) -> tuple[State, Float[Array, " steps"]]:
        """(the state, the losses) after a step on each of the batches, which lie along the leading axis."""
        return jax.lax.scan(lambda state, batch: self._step(state, batch, rate), state, batches)

    def _step(self, state: State, batch: Any, rate: Any) -> tuple[State, Float[Array, ""]]:
        params = state["params"]
        loss, grads = jax.value_and_grad(self.loss)(params, batch)
        norm, rule = optax.tree.norm(grads), self._rule(params, rate)
        params, opt_state = apply_gradient(rule, state, params, grads, norm, self.optimizer.clip_norm)
        return {"params": params, "opt_state": opt_state}, loss

    def _rule(self, params: Any, rate: Any) -> optax.GradientTransformation:
        return optax.chain(build(self.optimizer, self.steps, params), optax.scale(rate))
