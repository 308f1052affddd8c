"""Settings and tensors that several formats share."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from engrax.errors import UserError
from engrax.layers.common.matrix_memory import MatrixMemoryConfig
from engrax.layers.mixer import MixerConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.fields import Fields
from engrax.models.published.tables import Table, linear, split, taps


def shortest_pattern(layers: list[Any]) -> list[Any]:
    """The shortest list that, repeated, gives the layers."""
    sizes = (n for n in range(1, len(layers) + 1) if len(layers) % n == 0)
    return layers[: next(n for n in sizes if layers == layers[:n] * (len(layers) // n))]


def of_layers(
    layers: list[MixerConfig], layout: BlockStyleConfig, places: list[str] | None = None, **settings: Any
) -> LanguageModelConfig:
    """The language model with these mixers from first to last; places: of the norms, where the layers differ."""
    pattern = shortest_pattern(list(zip(layers, places or [layout.norm_place] * len(layers))))
    mixers, found = zip(*pattern)
    layout = dataclasses.replace(layout, norm_places=found) if places else layout
    return LanguageModelConfig(mixers=mixers, repeat=len(layers) // len(pattern), layout=layout, **settings)


def of_kind(config: LanguageModelConfig, kind: type[MixerConfig]) -> Any:
    """The first mixer of this kind, None if there is none."""
    return next((mixer for mixer in config.mixers if type(mixer) is kind), None)


def head_dim_of(fields: Fields, dim: int, heads: int, default: int | None = None) -> int:
    """The width of a head; default None = dim / heads."""
    if default is None and dim % heads:
        raise UserError(f"{fields.path}: {heads} heads do not divide the width {dim}.")
    return fields.take("head_dim", default or dim // heads)


def share_of(fields: Fields, name: str, default: float, dim: int, heads: int = 1) -> int:
    """The width of one of `heads` heads that together have `dim` times a field's value."""
    width = float(fields.take(name, default)) * dim
    if abs(width - round(width)) > 1e-6 * width or round(width) % heads:
        raise UserError(f"{fields.path}: {name}={width / dim} x {dim} channels cannot be divided among {heads} heads.")
    return round(width) // heads


def qkv(
    mixer: MatrixMemoryConfig,
    names: Sequence[str] = "qkv",
    prefix: str = "",
    taps_of: tuple[int, ...] | None = None,
) -> Table:
    """The joint projection and convolution of queries, keys and values as three of each.

    taps_of: where the convolution is cut, if not where the projection is.
    """
    found: Table = {}
    for at, name in enumerate(names):
        found |= linear(f"{prefix}{name}_proj", split("mixer.qkv", mixer.widths, at))
        found |= taps(f"{prefix}{name}_conv1d", split("mixer.conv", taps_of or mixer.widths, at))
    return found
