"""Layers that differ from a language model's pattern, and how layers are stacked.

A memory goes into a pretrained model through these settings: `LayerChange(at=(3, 7), branch=TitansConfig())`.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from engrax.errors import UserError
from engrax.layers.common.branched import BranchedConfig
from engrax.layers.mixer import MixerConfig

MOST_LAYERS = 1 << 12  # of a model with changed layers


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """Another mixer at some layers, or a branch beside the mixer."""

    at: tuple[int, ...] = ()  # the layers, from 0
    mixer: MixerConfig | None = None  # in place of the pattern's mixer; None = the pattern's
    branch: MixerConfig | None = None  # beside the mixer, behind a gate; None = no branch
    gate: float = 0.0  # the gate at the start, as the tanh's argument; 0 = closed: the output is the mixer's alone

    def __post_init__(self):
        if not self.at:
            raise UserError("layers: `at` names no layer; give the layers' numbers, from 0.")
        if self.mixer is None and self.branch is None:
            raise UserError("layers: neither mixer nor branch is given; say what the layers get.")


class Stack(NamedTuple):
    """Equal blocks, whose parameters are stacked."""

    mixer: MixerConfig
    layers: Sequence[int]  # their places in the model
    exchanged: bool  # the mixer is another than the pattern's


def mixers_of(config: Any) -> tuple[MixerConfig, ...]:
    """The mixer of each of a model's stacks; () for a model without mixers of its own."""
    return tuple(s.mixer for s in config.stacks) if hasattr(config, "stacks") else getattr(config, "mixers", ())


class _Layer(NamedTuple):
    mixer: MixerConfig
    exchanged: bool


def _changed(pattern: tuple[MixerConfig, ...], changes: tuple[LayerChange, ...]) -> list[_Layer]:
    layers, seen = [_Layer(mixer, False) for mixer in pattern], set()
    for change in changes:
        for at in change.at:
            if not 0 <= at < len(layers):
                raise UserError(f"layers: there is no layer {at}; the model has {len(layers)}, counted from 0.")
            if at in seen:
                raise UserError(f"layers: layer {at} is changed twice; name it once, with its mixer and its branch.")
            seen.add(at)
            mixer = change.mixer or pattern[at]
            if change.branch is not None:
                mixer = BranchedConfig(mixer, change.branch, change.gate)
            layers[at] = _Layer(mixer, change.mixer is not None)
    return layers


def stretches_of(
    mixers: tuple[MixerConfig, ...], repeat: int, changes: tuple[LayerChange, ...], *, whole: bool = False
) -> tuple[tuple[Stack, ...], ...]:
    """The stacks of blocks by the scan that runs them: a scan repeats a group of layers, and its stacks have one block
    of each group. The groups are the pattern, `mixers`; with changes they have the length of the fewest stacks.

    whole: groups are whole patterns, since a layer's place in the pattern has other settings than its mixer. Raises
    UserError for a layer that does not exist or is changed twice, and for changes in too many layers to list.
    """
    period, count = len(mixers), len(mixers) * repeat
    if not changes:
        return (tuple(Stack(mixer, range(i, count, period), False) for i, mixer in enumerate(mixers)),)
    if count > MOST_LAYERS:
        raise UserError(f"layers: a model of {count:,} layers can have no changed ones; at most {MOST_LAYERS:,} can.")
    layers, step = _changed(mixers * repeat, changes), period if whole else 1
    periods = [n for n in range(step, count + 1, step) if count % n == 0]
    return min((_stretches(layers, n) for n in periods), key=lambda found: sum(map(len, found)))


def _stretches(layers: list[_Layer], period: int) -> tuple[tuple[Stack, ...], ...]:
    groups = [(tuple(layers[i : i + period]), i) for i in range(0, len(layers), period)]
    found = []
    for group, equal in itertools.groupby(groups, key=lambda group: group[0]):
        starts = [start for _, start in equal]
        found.append(
            tuple(Stack(layer.mixer, tuple(s + i for s in starts), layer.exchanged) for i, layer in enumerate(group))
        )
    return tuple(found)
