"""What a comparison's numbers allow to say, by a rule laid down beforehand.

Every number has a 95 % interval from a bootstrap in which seeds and validation rows are drawn with replacement: seeds
for each experiment apart, rows for all together, since all are scored on the same ones. An experiment is *better* or
*worse* than another where the interval of their difference leaves out 0; else the comparison is *inconclusive*. The
spread of few seeds is widened by the root of n / (n - 1), which drawing from them with replacement takes away.
"""

import dataclasses
import math
import statistics
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from engrax.evals.comparison import Claim, Comparison, Row, kind

DRAWS = 4000
Verdict = Literal["better", "worse", "inconclusive"]
UNITS = {"text": "bits per byte", "tokens": "bits per token", "task": "accuracy"}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Line:
    """One experiment of the table."""

    name: str
    score: Interval
    difference: Interval | None  # to the first experiment; None for that one
    verdict: Verdict | None
    learning_rate: float
    at_edge: bool  # the best learning rate ends the grid: a wider one might be better
    diverged: int  # learning rates and seeds that did
    learnt_at: float | None  # median step over the seeds that learnt, tasks alone
    learnt_seeds: int
    parameters: int
    state_bytes: int | None
    flops_per_token: float | None


@dataclasses.dataclass(frozen=True)
class Judged:
    """A published ordering and what the comparison says about it."""

    claim: Claim
    difference: Interval  # better - worse, in the table's unit
    verdict: Literal["reproduced", "contradicted", "inconclusive"]


class Bootstrap:
    """The draws of one comparison: the same rows for every experiment, seeds of its own for each."""

    def __init__(self, rows: list[Row], draws: int = DRAWS):
        rng = np.random.default_rng(0)
        counts = rows[0].scores[0].counts
        self.counts, size = counts, len(counts)
        self.draws = rng.multinomial(size, np.full(size, 1 / size), draws)  # [draws, N]: how often each row is drawn
        self.seeds = {row.name: _seed_draws(rng, _sound(row), draws) for row in rows}
        self.sums = {row.name: np.stack([s.sums for s in row.scores if s.sums is not None]) for row in rows}

    def value(self, name: str) -> float:
        """The mean over seeds and rows."""
        return float(self.sums[name].mean(axis=0).sum() / self.counts.sum())

    def sample(self, name: str) -> Float[np.ndarray, " draws"]:
        """The mean over the drawn seeds and rows, for every draw."""
        by_seed = self.draws @ self.sums[name].T / (self.draws @ self.counts)[:, None]  # [draws, seeds]
        n, middle = by_seed.shape[1], by_seed.mean(axis=1, keepdims=True)
        widened = middle + math.sqrt(n / max(n - 1, 1)) * (by_seed - middle)
        return (self.seeds[name] * widened).sum(axis=1) / n

    def score(self, name: str) -> Interval:
        """An experiment's score."""
        return _interval(self.value(name), self.sample(name))

    def difference(self, name: str, other: str) -> Interval:
        """score(name) - score(other), on the same rows."""
        return _interval(self.value(name) - self.value(other), self.sample(name) - self.sample(other))


def _seed_draws(rng: np.random.Generator, seeds: int, draws: int) -> Int[np.ndarray, "draws seeds"]:
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws)


def _sound(row: Row) -> int:
    return sum(score.sums is not None for score in row.scores)


def _interval(value: float, sample: Float[np.ndarray, " draws"]) -> Interval:
    low, high = np.quantile(sample, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def judge(comparison: Comparison, rows: list[Row]) -> tuple[list[Line], list[Judged]]:
    """The lines of the table, in the comparison's order, and the verdicts on what is claimed."""
    drawn = Bootstrap(rows)
    higher_is_better = kind(comparison) == "task"
    first = rows[0].name
    lines = [_line(comparison, row, drawn, first, higher_is_better) for row in rows]
    words = {"better": "reproduced", "worse": "contradicted", "inconclusive": "inconclusive"}
    judged = []
    for claim in comparison.claims:
        difference = drawn.difference(claim.better, claim.worse)
        judged.append(Judged(claim, difference, words[verdict(difference, higher_is_better)]))
    return lines, judged


def verdict(difference: Interval, higher_is_better: bool) -> Verdict:
    """The rule of this module."""
    if difference.low <= 0 <= difference.high:
        return "inconclusive"
    return "better" if (difference.low > 0) == higher_is_better else "worse"


def _line(comparison: Comparison, row: Row, drawn: Bootstrap, first: str, higher_is_better: bool) -> Line:
    difference = None if row.name == first else drawn.difference(row.name, first)
    learnt = [score.learnt_at for score in row.scores if score.learnt_at is not None]
    state, flops = row.costs["state_bytes_per_sequence"], row.costs["flops_per_token"]
    diverged = sum(math.isnan(value) for value in row.grid.values()) + len(row.scores) - _sound(row)
    return Line(
        name=row.name,
        score=drawn.score(row.name),
        difference=difference,
        verdict=difference and verdict(difference, higher_is_better),
        learning_rate=row.learning_rate,
        at_edge=row.learning_rate in (min(comparison.learning_rates), max(comparison.learning_rates)),
        diverged=diverged,
        learnt_at=statistics.median(learnt) if learnt else None,
        learnt_seeds=len(learnt),
        parameters=row.costs["parameters"]["total"],
        state_bytes=state and state["total"],
        flops_per_token=flops and flops["forward"],
    )


def to_dict(lines: list[Line], judged: list[Judged]) -> dict[str, Any]:
    """For comparison.json."""
    return {
        "lines": [dataclasses.asdict(line) for line in lines],
        "claims": [dataclasses.asdict(found) for found in judged],
    }
