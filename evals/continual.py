"""What happens to earlier tasks of a continual stream while later ones are learnt (arXiv 2205.13452)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from engrax.data.continual import Continual
from engrax.errors import UserError

DRAWS = 1000  # of the bootstrap


def stability_gap(accuracy: Float[np.ndarray, "E K"], ends: Int[np.ndarray, " K"]) -> dict[str, float]:
    """Returns the metrics at the last of E evaluations, during or after the training of the last of K tasks.

    accuracy: of every task at every evaluation, in order of time.
    ends: for every task but the last, the evaluation at which its training ended (the last one's is not used).

    "min_accuracy" is the mean over the earlier tasks of the lowest accuracy after their training.
    "worst_case_accuracy" is accuracy_K / K + (1 - 1 / K) min_accuracy. "average_accuracy" is the mean over all tasks of
    the last accuracy, "forgetting" the mean over the earlier tasks of what they lost between their end and now.

    Raises UserError if there are fewer than two tasks, or if the ends are not ascending and followed by an evaluation.
    """
    evaluations, tasks = accuracy.shape
    earlier = np.asarray(ends)[:-1]
    if tasks < 2 or earlier.min() < 0 or earlier.max() >= evaluations - 1 or (np.diff(earlier) <= 0).any():
        raise UserError(
            f"a stability gap needs two tasks or more, whose trainings ended one by one before the last of "
            f"the {evaluations} evaluations, not {tasks} tasks that ended at {earlier.tolist()}."
        )
    lowest = np.mean([accuracy[end + 1 :, task].min() for task, end in enumerate(earlier)])
    lost = accuracy[earlier, np.arange(tasks - 1)] - accuracy[-1, :-1]
    return {
        "min_accuracy": float(lowest),
        "worst_case_accuracy": float(accuracy[-1, -1] / tasks + (1 - 1 / tasks) * lowest),
        "average_accuracy": float(accuracy[-1].mean()),
        "forgetting": float(lost.mean()),
    }


def checkpoints_of(stream: Continual, batch_size: int, steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """(the steps of the first epoch, for every task the place in it of the first step after the task's training).

    steps: of the checkpoints that a run on `stream` has kept, ascending. Raises UserError if they do not suffice for a
    stability gap.
    """
    rows, tasks = stream.num_examples("train"), len(stream.tasks)
    trained = [-(-(rows * (task + 1) // tasks) // batch_size) for task in range(tasks)]  # steps
    used = [step for step in steps if step <= trained[-1]]
    ends = [sum(step < end for step in used) for end in trained[:-1]]
    if tasks < 2 or len(set(ends)) < len(ends) or ends[-1] >= len(used) - 1:
        raise UserError(
            f"the stability gap needs a checkpoint at or after the end of each task (steps "
            f"{', '.join(map(str, trained))}), and the run has those of steps {', '.join(map(str, used)) or 'none'}; "
            "train with a smaller --checkpoint.every and a larger --checkpoint.keep-last."
        )
    return used, [*ends, len(used) - 1]


def stability_gap_of_rows(
    hits: Int[np.ndarray, "E N"], trials: Int[np.ndarray, "E N"], ends: Int[np.ndarray, " K"]
) -> dict[str, dict[str, float]]:
    """`stability_gap` with 95 % intervals: rows are drawn with replacement within each task, for all evaluations alike.

    hits of trials: at every evaluation, of every validation row; row i is of task i mod K.
    """
    tasks, rng = len(ends), np.random.default_rng(0)
    drawn, own = [], []
    for task in range(tasks):
        right, asked = hits[:, task::tasks], trials[:, task::tasks]
        times = rng.multinomial(right.shape[1], np.full(right.shape[1], 1 / right.shape[1]), size=DRAWS)
        drawn.append((times @ right.T) / (times @ asked.T))
        own.append(right.sum(axis=1) / asked.sum(axis=1))
    found = stability_gap(np.stack(own, axis=1), ends)
    spread = [stability_gap(accuracy, ends) for accuracy in np.stack(drawn, axis=2)]
    return {
        name: dict(zip(("value", "low", "high"), (value, *np.percentile([one[name] for one in spread], (2.5, 97.5)))))
        for name, value in found.items()
    }
