"""The shared training loop and what it needs. `engrax.train` is this package and, called, the function that trains."""

import sys
import types
from typing import TYPE_CHECKING

from engrax import lazy

if TYPE_CHECKING:
    from engrax.train.experiment import (
        CheckpointConfig,
        EvalConfig,
        Experiment,
        LogConfig,
        ParallelConfig,
    )
    from engrax.train.guards import GuardConfig
    from engrax.train.optimizers import (
        OPTIMIZERS,
        AdafactorConfig,
        AdamWConfig,
        FRUGALConfig,
        GaLoreConfig,
        LionConfig,
        MuonConfig,
        NaturalGaLoreConfig,
        OptimizerConfig,
        ScheduleFreeConfig,
        SGDConfig,
        SPAMConfig,
    )
    from engrax.train.schedules import (
        SCHEDULES,
        ConstantConfig,
        CosineConfig,
        InfiniteConfig,
        InverseRootConfig,
        LinearConfig,
        ScheduleConfig,
        WSDConfig,
        WSDSConfig,
    )

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "AdafactorConfig",
    "AdamWConfig",
    "CheckpointConfig",
    "ConstantConfig",
    "CosineConfig",
    "EvalConfig",
    "Experiment",
    "FRUGALConfig",
    "GaLoreConfig",
    "GuardConfig",
    "InfiniteConfig",
    "InverseRootConfig",
    "LinearConfig",
    "LionConfig",
    "LogConfig",
    "MuonConfig",
    "NaturalGaLoreConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SGDConfig",
    "SPAMConfig",
    "ScheduleConfig",
    "ScheduleFreeConfig",
    "WSDConfig",
    "WSDSConfig",
]

__getattr__ = lazy.attach(__name__)


class _CallablePackage(types.ModuleType):
    def __call__(self, config, run_dir, *, source=None, progress=True, **fields):
        """Trains a config (an Experiment, a name, or the path of a .py file) in `run_dir`; resumes the run there.

        `fields` replace fields of the experiment, dots written as double underscores: `optimizer__learning_rate=1e-3`.
        Returns `engrax.train.loop.Result`. Raises UserError for a mistake that the user can fix.
        """
        # The public face finds configs by name; this package must not import them.
        face = sys.modules[__name__.rpartition(".")[0]]
        return face._train(config, run_dir, source=source, progress=progress, **fields)


sys.modules[__name__].__class__ = _CallablePackage
