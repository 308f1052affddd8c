"""Modern Hopfield networks store exponentially many patterns, retrieve them in one update, and have three regimes.

    engrax reproduce hopfield_theory --preset full

Nothing is trained. tests/test_hopfield_theory.py holds these and further properties as tests.
"""

import functools
import math

import numpy as np

from engrax.evals import claims, plots
from engrax.evals.claims import Finding, Found
from engrax.evals.verdicts import Interval
from engrax.pallas_kernels import hopfield_retrieval

QUERIES, CLOSE = 400, 0.05  # states per figure; error in radii at which a pattern counts as retrieved
BETAS = (0.01, 0.1, 1.0)  # of the three regimes: 4 clusters of 16 patterns


def card() -> claims.Card:
    """The claims; the quick preset draws one sample, the full one ten, and patterns of one more width."""
    return claims.Card(
        paper="arXiv 2008.02217: with softmax retrieval the number of patterns that fit grows exponentially with their "
        "width d (theorem 3); one update comes within an error that falls exponentially with the separation "
        "(theorem 4); at a low beta states rest at the mean of all patterns, then at means of clusters, then at single "
        "patterns.",
        here="Patterns on a sphere of radius sqrt(d - 1), beta 1, 400 states with noise of deviation 0.5: the largest "
        "number of patterns, among powers of 2, of which 95 % are retrieved to 5 % of the radius by one update. One "
        "update against the bound 2 (N - 1) exp(-beta Delta) M at 1,000 patterns. Four clusters of 16 patterns at beta "
        "0.01, 0.1 and 1.",
        rule="Over independent samples: the growth of log2(capacity) from each width to the next is positive with its "
        "whole 95 % interval (Student's t); no error exceeds its bound in any sample; in every sample states of the "
        "three betas hold 90 % of their weight in more than 48, in 8 to 24, and in at most 1.5 patterns (means). The "
        "quick preset has one sample and gives a look at the first, and its own verdict on the others.",
        quick=functools.partial(run, widths=(8, 12, 16), samples=1),
        full=functools.partial(run, widths=(8, 12, 16, 20), samples=10),
    )


def run(folder, options, *, widths: tuple[int, ...], samples: int) -> Found:
    """All three claims."""
    found = [[capacity(np.random.default_rng((seed, d)), d) for d in widths] for seed in range(samples)]
    logs = np.log2(np.array(found, float))
    name = f"capacity grows with the width ({widths[0]} to {widths[-1]}), log2 a step"
    contrast = claims.Contrast(name, ("growth", "log2"), 0.0)
    per_sample = [{"log2": float((row[-1] - row[0]) / (len(widths) - 1))} for row in logs]
    findings = claims.contrasted([contrast], {"growth": per_sample}, max(samples, 3))
    errors = [excess(np.random.default_rng((seed, 1)), d) for seed in range(samples) for d in widths]
    findings.append(
        _certain("one update is within its bound (1 = at it), largest error", 1 - max(errors), max(errors) <= 1)
    )
    held = [holding(np.random.default_rng((seed, 2))) for seed in range(samples)]
    right = all(low > 48 and 8 <= middle <= 24 and high <= 1.5 for low, middle, high in held)
    findings.append(_certain("three regimes: patterns that hold the weight", float(right), right))
    lines = ["| width | patterns retrieved, median of the samples |", "| --- | --- |"]
    lines += [f"| {d} | {2 ** np.median(logs[:, i]):,.0f} |" for i, d in enumerate(widths)]
    means = np.mean(held, axis=0)
    lines += ["", "| beta | patterns with 90 % of the weight |", "| --- | --- |"]
    lines += [f"| {beta:g} | {mean:.1f} |" for beta, mean in zip(BETAS, means)]
    data = {"widths": widths, "capacity": found, "bound": errors, "regimes": held}
    return Found(findings, "\n".join(lines) + "\n", {"Capacity by width": _plot(widths, 2.0**logs)}, data)


def _certain(claim: str, value: float, holds: bool) -> Finding:
    """A claim about every sample, without an interval."""
    return Finding(claim, Interval(value, math.nan, math.nan), "reproduced" if holds else "contradicted")


def sphere(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Patterns [count, width] of length sqrt(width - 1)."""
    x = rng.normal(size=(count, width))
    return (np.sqrt(width - 1) * x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def retrieve(state: np.ndarray, stored: np.ndarray, **options) -> np.ndarray:
    """One update of states [N, D] on patterns [M, D]."""
    return np.asarray(hopfield_retrieval(*(x[None, :, None] for x in (state, stored)), **options))[0, :, 0]


def capacity(rng: np.random.Generator, width: int, most: int = 16) -> int:
    """The largest power of 2 of patterns of which 95 % are retrieved; 1 if two are too many."""
    x, radius = sphere(rng, 2**most, width), np.sqrt(width - 1)
    shift = rng.normal(size=(QUERIES, width)) * 0.5
    for power in range(1, most + 1):
        count = min(2**power, QUERIES)
        state = (x[:count] + shift[:count]).astype(np.float32)
        error = np.linalg.norm(retrieve(state, x[: 2**power], beta=1.0) - x[:count], axis=1)
        if np.mean(error < CLOSE * radius) < 0.95:
            return 2 ** (power - 1)
    return 2**most


def excess(rng: np.random.Generator, width: int, patterns: int = 1000) -> float:
    """The largest error of one update from a pattern itself, as a part of the bound or, if larger, of rounding."""
    x = sphere(rng, patterns, width)
    gram = x.astype(np.float64) @ x.astype(np.float64).T
    separation = np.diag(gram) - np.where(np.eye(patterns, dtype=bool), -np.inf, gram).max(axis=1)
    bound = 2 * (patterns - 1) * np.exp(-separation) * np.sqrt(width - 1)
    error = np.linalg.norm(retrieve(x, x, beta=1.0) - x, axis=1)
    return float(np.max(error / np.maximum(bound, 1e-5)))


def holding(rng: np.random.Generator, share: float = 0.9) -> tuple[float, ...]:
    """How many of 64 patterns in 4 clusters hold that share of a pattern's weight, for every beta."""
    x = (rng.normal(size=(4, 1, 32)) + rng.normal(size=(4, 16, 32))).reshape(64, 32).astype(np.float32)
    found = []
    for beta in BETAS:
        values = np.eye(64, dtype=np.float32)[None, :, None]
        p = np.asarray(hopfield_retrieval(*(y[None, :, None] for y in (x, x)), values, beta=beta))[0, :, 0]
        found.append(float((1 + (np.cumsum(-np.sort(-p, axis=1), axis=1) < share).sum(axis=1)).mean()))
    return tuple(found)


def _plot(widths: tuple[int, ...], capacities: np.ndarray) -> bytes:
    with plots.canvas("Patterns retrieved after one update") as drawn:
        axis = drawn.axes[0, 0]
        axis.plot(widths, np.median(capacities, axis=0), "o-", color=plots.BLUE, label="median of the samples")
        axis.fill_between(widths, capacities.min(axis=0), capacities.max(axis=0), color=plots.BLUE, alpha=0.15, lw=0)
        axis.set(xlabel="width of a pattern", ylabel="patterns", yscale="log", xticks=widths)
        axis.legend()
    return drawn.png
