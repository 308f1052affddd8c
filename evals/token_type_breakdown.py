"""Diagnostics of every token by the token's type: which memory gets what, or what is hard to write."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from engrax.data.token_types import TokenTypes
from engrax.evals import plots
from engrax.evals.scoring import Rows
from engrax.train.experiment import Experiment

ALL = "all tokens"  # the first row of every table


def types_of(experiment: Experiment, rows: Rows) -> TokenTypes:
    """The types of the rows' tokens; -1 at padding. Types without a token are left out."""
    names, index = experiment.data.token_types(rows.arrays())
    real = rows.segment_ids >= 0
    used = [i for i in range(len(names)) if np.any(index[real] == i)]
    renumbered = np.full(len(names), -1)
    renumbered[used] = np.arange(len(used))
    return TokenTypes(tuple(names[i] for i in used), np.where(real, renumbered[index], -1))


def counts(types: TokenTypes) -> dict[str, int]:
    """Tokens of every type, those of all first."""
    found = np.bincount(types.index[types.index >= 0], minlength=len(types.names)).tolist()
    return {ALL: sum(found)} | dict(zip(types.names, found))


def means(values: Float[np.ndarray, "N T ..."], index: Int[np.ndarray, "N T"], types: int) -> list:
    """Means over all tokens, then over those of each type; NaN values (padding, nothing to tell) do not count."""
    chosen = [index >= 0, *(index == i for i in range(types))]
    return [_mean(values[tokens]).tolist() for tokens in chosen]


def _mean(values: Float[np.ndarray, "N ..."]) -> Float[np.ndarray, "..."]:
    known = np.isfinite(values)
    count = known.sum(axis=0)
    return np.where(count, np.where(known, values, 0).sum(axis=0) / np.maximum(count, 1), np.nan)


def panels(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tables of results.json's content by title: {"values" [types, columns], "columns", "axis", "top" of the scale}.

    A diagnostic with a value for each memory has a table for every layer, one with a single value one table whose
    columns are the layers.
    """
    found = {}
    for name, by in data["memory"].items():
        layers = {layer: np.asarray(v["by_type"], float) for layer, v in by.items() if "by_type" in v}
        if not layers:
            continue
        top = max(np.nanmax(table, initial=0) for table in layers.values())
        if next(iter(layers.values())).ndim == 1:
            blocks = [layer.removeprefix("block ") for layer in layers]
            tables = {name: (np.stack(list(layers.values()), axis=1), blocks, "block")}
        else:
            tables = {f"{name}, {layer}": (t, range(t.shape[1]), "memory") for layer, t in layers.items()}
        for title, (values, columns, axis) in tables.items():
            found[title] = {"values": values, "columns": list(map(str, columns)), "axis": axis, "top": top}
    return found


def draw(title: str, data: dict[str, Any]) -> tuple[bytes, str] | None:
    """The heat maps and what to see in them, or None where no diagnostic is by token."""
    found = panels(data)
    if not found:
        return None
    tokens = data["token_types"]
    total = tokens[ALL]
    rows = [ALL, *(f"{name} ({share(n / total)})" for name, n in tokens.items() if name != ALL)]
    return plots.tables(title, rows, found), " ".join(_sentences(data["memory"], list(tokens)))


def share(part: float) -> str:
    """A share in per cent, whole ones from 1 % on."""
    return f"{part:.0%}" if part >= 0.01 else f"{part:.1%}"


def _sentences(memory: dict[str, Any], names: list[str]) -> list[str]:
    """How to read the tables, and for each diagnostic with a value per memory where the types differ the most."""
    words = [
        "Means over the validation tokens of each type (in brackets: its share of all tokens); a row like the first "
        "means that the type makes no difference."
    ]
    for name, by in memory.items():
        layers = {layer: np.asarray(v["by_type"], float) for layer, v in by.items() if np.ndim(v.get("by_type")) == 2}
        if not layers:
            continue
        off = {layer: np.nan_to_num(np.abs(table - table[0])) for layer, table in layers.items()}
        layer = max(off, key=lambda layer: off[layer].max())
        kind, column = np.unravel_index(off[layer].argmax(), off[layer].shape)
        if off[layer].max() > 0:
            value, mean = layers[layer][kind, column], layers[layer][0, column]
            words.append(
                f"{name} differs most in {layer}: {value:.2f} for memory {column} and {names[kind]}, {mean:.2f} over "
                "all tokens."
            )
    return words
