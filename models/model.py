"""Settings of models, their registry, and `build`, which builds every model.

A model config builds a Flax NNX module that implements the forward contract (`engrax.models.contract`).
"""

import dataclasses
from typing import ClassVar

from flax import nnx

from engrax.models.contract import Model, as_model
from engrax.models.parameters import declare_roles
from engrax.registry import Registry

MODELS = Registry("model", "engrax.models")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of every model's settings. A subclass is a frozen dataclass, registered with `@engrax.register(name)`."""

    registry: ClassVar[Registry] = MODELS
    registered_name: ClassVar[str] = ""
    exempt_from: ClassVar[dict[str, str]] = {}  # {law or law.part: reason}, as for mixers
    splits_rows: ClassVar[bool] = False  # whether its module runs on rows split over devices (`parallel.sequence`)

    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the module with freshly initialised parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define build(*, rngs).")

    @classmethod
    def examples(cls) -> tuple["ModelConfig", ...]:
        """Small settings that together use every code path; the laws run on all of them."""
        return (cls(),)

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs per token of a row of `seq_len` tokens (a multiply-add counts 2), memory updates included."""
        raise NotImplementedError(f"{type(self).__name__} must define flops_per_token(seq_len).")


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> Model:
    """The model of a config, every parameter with its role. Raises UserError for a parameter without one."""
    return declare_roles(as_model(config.build(rngs=rngs)))
