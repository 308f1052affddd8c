"""What happens to earlier tasks of a continual stream while later ones are learnt (arXiv 2205.13452)."""

import numpy as np
from jaxtyping import Float, Int

from engrax.errors import UserError


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
