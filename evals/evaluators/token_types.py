"""Diagnostics per token, averaged by token type: the load of each memory, or the surprise."""

import dataclasses
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from engrax.evals import plots
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure
from engrax.registry import register

ALL = "all tokens"  # the first row of every table


@register("token_types")
@dataclasses.dataclass(frozen=True)
class TokenTypesConfig(EvaluatorConfig):
    """The memories' diagnostics per token, averaged by token type."""

    order: ClassVar[int] = 60

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        types = context.token_types
        counted = np.bincount(types.index[types.index >= 0], minlength=len(types.names)).tolist()
        tables: dict[str, dict[str, list]] = {}
        for name, values in context.diagnostics.items():
            for repeat in range(values.shape[1]):
                layer = values[:, repeat]
                if layer.shape[:2] == types.index.shape and layer.ndim > 1:
                    table = means(layer, types.index, len(types.names))
                    tables.setdefault(name, {})[context.block(name, repeat)] = table
        values = {"tokens": {ALL: sum(counted)} | dict(zip(types.names, counted)), "means": tables}
        return Evaluation(values, [_figure(context.title, values)] if tables else [])


def means(values: Float[np.ndarray, "N T ..."], index: Int[np.ndarray, "N T"], types: int) -> list:
    """Means over all tokens, then over those of each type; NaN values (padding, nothing to tell) do not count."""
    chosen = [index >= 0, *(index == i for i in range(types))]
    return [_mean(values[tokens]).tolist() for tokens in chosen]


def _mean(values: Float[np.ndarray, "N ..."]) -> Float[np.ndarray, "..."]:
    known = np.isfinite(values)
    count = known.sum(axis=0)
    return np.where(count, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _figure(title, values: dict[str, Any]) -> Figure:
    """The heat maps and what to see in them."""
    heading, tokens = "Memory by type of token", values["tokens"]
    rows = [ALL, *(f"{name} ({share(n / tokens[ALL])})" for name, n in tokens.items() if name != ALL)]
    png = plots.tables(title(heading), rows, panels(values["means"]))
    return Figure("memory_by_type", heading, " ".join(_sentences(values["means"], list(tokens))), png)


def panels(tables: dict[str, dict[str, list]]) -> dict[str, dict[str, Any]]:
    """The heat maps by title: {"values" [types, columns], "columns", "axis", "top" of the scale}.

    A diagnostic with a value for each memory has one for every block, one with a single value has one in all, whose
    columns are the blocks.
    """
    found = {}
    for name, by in tables.items():
        blocks = {block: np.asarray(table, float) for block, table in by.items()}
        top = max(np.nanmax(table, initial=0) for table in blocks.values())
        if next(iter(blocks.values())).ndim == 1:
            columns = [block.removeprefix("block ") for block in blocks]
            drawn = {name: (np.stack(list(blocks.values()), axis=1), columns, "block")}
        else:
            drawn = {f"{name}, {block}": (t, range(t.shape[1]), "memory") for block, t in blocks.items()}
        for title, (table, columns, axis) in drawn.items():
            found[title] = {"values": table, "columns": list(map(str, columns)), "axis": axis, "top": top}
    return found


def share(part: float) -> str:
    """A share in per cent, whole ones from 1 % on."""
    return f"{part:.0%}" if part >= 0.01 else f"{part:.1%}"


def _sentences(tables: dict[str, dict[str, list]], names: list[str]) -> list[str]:
    """How to read the heat maps, and for each diagnostic with a value per memory where the types differ the most."""
    words = [
        "Means over the validation tokens of each type (in brackets: its share of all tokens). A row like the first "
        "means that the type makes no difference."
    ]
    for name, by in tables.items():
        blocks = {block: np.asarray(table, float) for block, table in by.items() if np.ndim(table) == 2}
        if not blocks:
            continue
        off = {block: np.nan_to_num(np.abs(table - table[0])) for block, table in blocks.items()}
        block = max(off, key=lambda block: off[block].max())
        kind, column = np.unravel_index(off[block].argmax(), off[block].shape)
        if off[block].max() > 0:
            value, mean = blocks[block][kind, column], blocks[block][0, column]
            words.append(
                f"{name} differs most in {block}: {value:.2f} for memory {column} and {names[kind]}, {mean:.2f} over "
                "all tokens."
            )
    return words
