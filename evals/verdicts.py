"""Turns the scores of a comparison into verdicts with a fixed rule.

Every number has a 95 % interval from a bootstrap in which seeds and validation rows are drawn with replacement: seeds
for each experiment separately, rows for all together, because all are scored on the same rows. The spread of n seeds is
widened by the root of n / (n - 1), which the draws lose, and by the ratio of Student's t to the normal quantile,
because seeds are few (without it two equal models differed in 12 of 100 comparisons of 3 seeds).

An experiment is *better* or *worse* than another if the interval of their difference excludes 0. Otherwise, and if a
judged seed diverged, the comparison is *inconclusive*. A table of m verdicts is corrected after Holm (1979): the
clearest difference is judged by its interval at 1 - 0.05 / m, the next at 1 - 0.05 / (m - 1), and so on to the first
that is inconclusive; all later ones are inconclusive too. The chance of even one wrong verdict in a table is then at
most 5 %. The intervals shown are the plain 95 % intervals.
"""

import dataclasses
import math
import statistics
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from engrax.evals import scoring
from engrax.evals.comparison import Claim, Comparison, Row
from engrax.evals.finished_runs import Finished

DRAWS = 4000
LEVEL = 0.05  # largest chance of a wrong verdict in a table of equal experiments
LEAST_SEEDS = 3  # of each side of a verdict
Verdict = Literal["better", "worse", "inconclusive", "no verdict"]  # the last: too few seeds, or no baseline


@dataclasses.dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One experiment of the table."""

    name: str
    score: Interval
    difference: Interval | None  # to the first experiment; None for that one and without a verdict
    verdict: Verdict | None
    learning_rate: float
    at_edge: bool  # the best learning rate is at an end of the grid: a wider grid might be better
    diverged: int  # learning rates and seeds that diverged
    learnt_at: float | None  # median step over the seeds that learnt; tasks only
    learnt_seeds: int
    seeds: int  # judged
    parameters: int
    state_bytes: int | None
    flops_per_token: float | None


@dataclasses.dataclass(frozen=True)
class ClaimVerdict:
    """A published ordering and the comparison's verdict on it."""

    claim: Claim
    difference: Interval  # better - worse, in the table's unit
    verdict: Literal["reproduced", "contradicted", "inconclusive"]


class Bootstrap:
    """The draws of one comparison: the same rows for every experiment, separate seeds for each."""

    def __init__(self, rows: list[Row], draws: int = DRAWS):
        rng = np.random.default_rng(0)
        counts = next(score.counts for score in rows[0].scores if score.counts is not None)
        self.counts, size = counts, len(counts)
        self.draws = rng.multinomial(size, np.full(size, 1 / size), draws)  # [draws, N]: how often each row is drawn
        self.seeds = {row.name: _seed_draws(rng, _sound(row), draws) for row in rows}
        self.sums = {row.name: np.stack([s.sums for s in row.scores if s.sums is not None]) for row in rows}

    def value(self, name: str) -> float:
        """The mean over seeds and rows."""
        return float(self.sums[name].mean(axis=0).sum() / self.counts.sum())

    def sample(self, name: str, freedom: int, level: float = LEVEL) -> Float[np.ndarray, " draws"]:
        """The mean over the drawn seeds and rows, for every draw.

        freedom: degrees of freedom of the t that widens the seeds' spread for an interval of 1 - level.
        """
        from scipy.stats import norm, t

        by_seed = self.draws @ self.sums[name].T / (self.draws @ self.counts)[:, None]  # [draws, seeds]
        n, middle = by_seed.shape[1], by_seed.mean(axis=1, keepdims=True)
        widening = math.sqrt(n / max(n - 1, 1)) * t.ppf(1 - level / 2, max(freedom, 1)) / norm.ppf(1 - level / 2)
        widened = middle + widening * (by_seed - middle)
        return (self.seeds[name] * widened).sum(axis=1) / n

    def score(self, name: str) -> Interval:
        """An experiment's score."""
        return _interval(self.value(name), self.sample(name, len(self.sums[name]) - 1))

    def difference(self, name: str, other: str, level: float = LEVEL) -> Interval:
        """score(name) - score(other) on the same rows, with its interval of 1 - level."""
        freedom = len(self.sums[name]) + len(self.sums[other]) - 2
        samples = [self.sample(n, freedom, level) for n in (name, other)]
        return _interval(self.value(name) - self.value(other), samples[0] - samples[1], level)


def _seed_draws(rng: np.random.Generator, seeds: int, draws: int) -> Int[np.ndarray, "draws seeds"]:
    return rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws)


def _sound(row: Row) -> int:
    return sum(score.sums is not None for score in row.scores)


def _interval(value: float, sample: Float[np.ndarray, " draws"], level: float = LEVEL) -> Interval:
    low, high = np.quantile(sample, [level / 2, 1 - level / 2])
    return Interval(value, float(low), float(high))


def judge(comparison: Comparison | Finished, rows: list[Row]) -> tuple[list[TableRow], list[ClaimVerdict]]:
    """The rows of the table, in the comparison's order, and the verdicts on the claims.

    Only rows of LEAST_SEEDS seeds or more have verdicts, and only if the comparison's first experiment is one of them.
    """
    drawn = Bootstrap(rows)
    higher_is_better = scoring.kind_of(next(iter(comparison.experiments.values()))) == "task"
    whole = {row.name for row in rows if _sound(row) == len(row.scores)}
    enough = {row.name for row in rows if len(row.scores) >= LEAST_SEEDS}
    first = next(iter(comparison.experiments))

    def verdicts(pairs: list[tuple[str, str]]) -> list[Verdict]:
        known = [pair for pair in pairs if (whole & enough).issuperset(pair)]
        found = dict(zip(known, holm(drawn, known, higher_is_better)))
        otherwise = lambda pair: "inconclusive" if enough.issuperset(pair) else "no verdict"  # noqa: E731
        return [found.get(pair, otherwise(pair)) for pair in pairs]

    others = [row.name for row in rows if row.name != first]
    said = dict(zip(others, verdicts([(name, first) for name in others])))
    lines = [_line(row, drawn, first, said.get(row.name), higher_is_better) for row in rows]
    words = {"better": "reproduced", "worse": "contradicted", "inconclusive": "inconclusive"}
    claims = [claim for claim in comparison.claims if enough.issuperset((claim.better, claim.worse))]
    pairs = [(claim.better, claim.worse) for claim in claims]
    judged = [
        ClaimVerdict(claim, drawn.difference(*pair), words[found])
        for claim, pair, found in zip(claims, pairs, verdicts(pairs))
    ]
    return lines, judged


def holm(drawn: Bootstrap, pairs: list[tuple[str, str]], higher_is_better: bool) -> list[Verdict]:
    """The verdicts on the first of each pair against the second, corrected for their number (Holm 1979)."""
    found: list[Verdict] = ["inconclusive"] * len(pairs)
    differences = [drawn.difference(*pair) for pair in pairs]
    clearest = sorted(range(len(pairs)), key=lambda i: _clearness(differences[i]), reverse=True)
    for rank, i in enumerate(clearest):
        found[i] = verdict(drawn.difference(*pairs[i], LEVEL / (len(pairs) - rank)), higher_is_better)
        if found[i] == "inconclusive":
            break
    return found


def _clearness(difference: Interval) -> float:
    """The value in lengths of its interval's side towards 0: above 1 the interval excludes 0."""
    side = difference.value - (difference.low if difference.value > 0 else difference.high)
    if side:
        return difference.value / side if math.isfinite(difference.value) else -math.inf
    return math.inf if difference.value else 0.0


def verdict(difference: Interval, higher_is_better: bool) -> Verdict:
    """The verdict of one difference from its own interval."""
    if difference.low > 0 or difference.high < 0:
        return "better" if (difference.low > 0) == higher_is_better else "worse"
    return "inconclusive"  # also for a difference that is not a number


def _line(row: Row, drawn: Bootstrap, first: str, said: Verdict | None, higher_is_better: bool) -> TableRow:
    learnt = [score.learnt_at for score in row.scores if score.learnt_at is not None]
    state, flops = row.costs["state_bytes_per_sequence"], row.costs["flops_per_token"]
    diverged = sum(math.isnan(value) for value in row.grid.values()) + len(row.scores) - _sound(row)
    score = drawn.score(row.name)
    if higher_is_better:  # an accuracy, which the widened interval may leave
        score = Interval(score.value, max(score.low, 0.0), min(score.high, 1.0))
    return TableRow(
        name=row.name,
        score=score,
        difference=None if said in (None, "no verdict") else drawn.difference(row.name, first),
        verdict=said,
        learning_rate=row.learning_rate,
        at_edge=bool(row.grid) and row.learning_rate in (min(row.grid), max(row.grid)),
        diverged=diverged,
        learnt_at=statistics.median(learnt) if learnt else None,
        learnt_seeds=len(learnt),
        seeds=len(row.scores),
        parameters=row.costs["parameters"]["total"],
        state_bytes=state and state["total"],
        flops_per_token=flops and flops["forward"],
    )


def to_dict(lines: list[TableRow], judged: list[ClaimVerdict]) -> dict[str, Any]:
    """For comparison.json."""
    return {
        "lines": [dataclasses.asdict(line) for line in lines],
        "claims": [dataclasses.asdict(found) for found in judged],
    }
