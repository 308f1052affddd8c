"""Any generated task as a TFDS data set: built offline as ArrayRecord; `tfds.data_source` reads it without this code.

    from engrax.data import MQAR
    from engrax.data.tfds_tasks import build
    build(MQAR(num_pairs=8), data_dir="data")                       # returns "engrax_tasks/mqar_..."
    tfds.data_source("engrax_tasks/mqar_...", split="train", data_dir="data")[0]   # {"index", "tokens", "targets"}

`engrax.data` does not import this module, because it imports `tensorflow_datasets`.
"""

import dataclasses

import numpy as np
import tensorflow_datasets as tfds

from engrax.data.config import SPLITS
from engrax.data.mqar import MQAR
from engrax.data.task import TaskConfig

_BLOCK = 1024  # examples generated at once


@dataclasses.dataclass(kw_only=True)
class TaskBuilderConfig(tfds.core.BuilderConfig):
    """A TFDS config that holds the task and is named after it."""

    task: TaskConfig = dataclasses.field(default_factory=MQAR)


def config_name(task: TaskConfig) -> str:
    """Returns the TFDS config name of a task: its name and length, and the start of its digest for the other fields."""
    return f"{task.registered_name}_l{task.seq_len}_{task.digest()[:8]}"


class EngraxTasks(tfds.core.GeneratorBasedBuilder):
    """A generated task: "index" in the split, "tokens" and "targets" (-1 = no loss), int32 [T]."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [TaskBuilderConfig(name=config_name(MQAR()), description="The default task.")]

    def _info(self) -> tfds.core.DatasetInfo:
        task = self.builder_config.task
        row = {name: tfds.features.Tensor(shape=(task.seq_len,), dtype=np.int32) for name in ("tokens", "targets")}
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(task).__doc__,
            features=tfds.features.FeaturesDict({"index": tfds.features.Scalar(dtype=np.int64), **row}),
            disable_shuffling=True,  # record i is example i of the split
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str):
        task = self.builder_config.task
        count = task.num_examples(split)
        for start in range(0, count, _BLOCK):
            indices = np.arange(start, min(start + _BLOCK, count))
            tokens, targets = task.generate(split, indices)
            for i, index in enumerate(indices.tolist()):
                yield index, {"index": index, "tokens": tokens[i], "targets": targets[i]}


def build(task: TaskConfig, data_dir: str) -> str:
    """Builds the task's data set under `data_dir`, if it is missing, and returns its TFDS name.

    Neither network nor TensorFlow is needed.
    """
    config = TaskBuilderConfig(name=config_name(task), description=repr(task), task=task)
    builder = EngraxTasks(data_dir=data_dir, config=config, file_format="array_record")
    builder.download_and_prepare()
    return f"{builder.name}/{config.name}"
