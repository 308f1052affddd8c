"""What a published format is: its config.json in both directions, and one table of tensors, used in both directions."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from engrax.layers.mixer import MixerConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.fields import Fields


class Part(NamedTuple):
    """A part of a tensor: a parameter, or columns of it."""

    param: str | None  # None: zeros
    columns: tuple[int, int] | None = None  # from, to of its last axis; None = all
    index: tuple[int, ...] = ()  # its place along the axes between the layers' and the tensor's: a memory's number


@dataclasses.dataclass(frozen=True)
class Tensor:
    """How a tensor is made of parameters.

    Its parts lie side by side along their last axis, the outputs. Then it is stored by its form: `plain` as it is,
    `matrix` as [out, in], `taps` of a convolution [W, C] as [C, 1, W] with the current token last, `flat` as [N].
    """

    parts: tuple[Part, ...]
    form: Literal["plain", "matrix", "taps", "flat"] = "plain"
    shift: float = 0.0  # the tensor is the parameter plus this: -1 where a norm multiplies by 1 + w
    scale: float = 1.0  # and times this, a power of 2
    group: int | None = None  # the parts alternate in groups of so many columns; None = one part after another

    def pack(self, parts: list[np.ndarray]) -> np.ndarray:
        """The tensor of its parts [..., out], in their dtype."""
        if self.group:
            grouped = [part.reshape(*part.shape[:-1], -1, self.group) for part in parts]
            value = np.stack(grouped, axis=-2).reshape(*parts[0].shape[:-1], -1)
        else:
            value = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
        if self.shift or self.scale != 1:
            value = (value * self.scale + self.shift).astype(value.dtype)
        if self.form == "flat":
            return value.reshape(-1)
        if self.form == "taps":
            return value[::-1].T[:, None]
        return value.T if self.form == "matrix" else value

    def unpack(self, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The parts side by side, of this shape, from the tensor; the inverse of `pack`."""
        if self.form == "taps":
            value = value[:, 0].T[::-1]
        value = value.T if self.form == "matrix" else value.reshape(shape)
        if self.group:
            grouped = value.reshape(*shape[:-1], -1, len(self.parts), self.group)
            value = np.moveaxis(grouped, -2, -3).reshape(shape)
        if self.shift or self.scale != 1:
            value = (value.astype(np.float32) - self.shift) / self.scale
        return value

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from that of its parts side by side."""
        if self.form == "flat":
            return (math.prod(shape),)
        if self.form == "taps":
            return (shape[1], 1, shape[0])
        return shape[::-1] if self.form == "matrix" else shape

    @property
    def is_plain(self) -> bool:
        """Whether a slice of the parameter is a slice of the tensor."""
        return self.form in ("plain", "matrix") and not self.group


Shapes = dict[str, tuple[int, ...]]  # by name
Table = dict[str, Tensor]  # by the tensor's name; "{}" in it is the number of the layer


def linear(tensor: str, *params: str | Part, form: str = "matrix") -> Table:
    """Weight and bias of a linear map, from those of maps side by side."""
    parts = [Part(param) if isinstance(param, str) else param for param in params]
    weights, biases = (
        tuple(part if part.param is None else part._replace(param=f"{part.param}.{end}") for part in parts)
        for end in ("kernel", "bias")
    )
    return {f"{tensor}.weight": Tensor(weights, form), f"{tensor}.bias": Tensor(biases)}


def split(param: str, widths: tuple[int, ...], at: int, index: tuple[int, ...] = ()) -> Part:
    """Columns of a parameter that holds maps of these widths side by side."""
    return Part(param, (sum(widths[:at]), sum(widths[: at + 1])), index)


def taps(tensor: str, *params: Part) -> Table:
    """Weight and bias of a depthwise convolution."""
    weights, biases = (
        tuple(part._replace(param=f"{part.param}.{end}") for part in params) for end in ("kernel", "bias")
    )
    return {f"{tensor}.weight": Tensor(weights, "taps"), f"{tensor}.bias": Tensor(biases)}


def norm(tensor: str, param: str, shift: float = 0.0) -> Table:
    """Scale and bias of a norm."""
    return {
        f"{tensor}.weight": Tensor((Part(f"{param}.scale"),), shift=shift),
        f"{tensor}.bias": Tensor((Part(f"{param}.bias"),)),
    }


def plain(tensor: str, param: str, form: str = "plain") -> Table:
    """One parameter."""
    return {tensor: Tensor((Part(param),), form)}


def gated_mlp(prefix: str) -> Table:
    """The three maps of a gated MLP."""
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    return {k: v for theirs, ours in names.items() for k, v in linear(f"{prefix}.{theirs}", f"mlp.{ours}").items()}


def embeddings(table: str, final: str, shift: float = 0.0) -> Table:
    """Embedding, final norm and head."""
    return plain(table, "embedding") | norm(final, "norm", shift) | plain("lm_head.weight", "output_embedding")


@dataclasses.dataclass(frozen=True)
class Format:
    """A published format."""

    name: str  # `model_type` in config.json
    architecture: str  # the first of its `architectures`
    library: Literal["transformers", "fla"]  # where its class is
    mixers: tuple[type[MixerConfig], ...]  # what it has layers of
    read: Callable[[Fields], LanguageModelConfig]  # settings, from config.json
    write: Callable[[LanguageModelConfig], dict[str, Any]]  # config.json, from settings; `fit` finds what it cannot say
    outside: Table  # the tensors outside the layers
    block: Callable[[LanguageModelConfig, int, Shapes], Table]  # those of the layers at a position of the
    # pattern, of parameters named from the block on; Shapes: those of a folder that is read, else none
    prefixes: tuple[str, ...]  # of all names except the head's: the current one first, then older ones
    skipped: tuple[str, ...] = ()  # endings of the names of buffers, which are not parameters
    others: tuple[str, ...] = ()  # beginnings of the names of other parts of the same checkpoint
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # MIXER.SETTING -> what becomes of it
    caveat: str = ""  # what its library does wrong

    def pieces(self, config: LanguageModelConfig, shapes: Shapes, stored: Shapes | None = None) -> dict[str, "Piece"]:
        """The tensors that a model's parameters need. shapes: of the parameters; stored: of the tensors
        of a folder that is read."""
        stored = stored or {}
        used = [prefix for prefix in self.prefixes if any(name.startswith(prefix) for name in stored)]
        prefix = max(used, key=len, default="") if stored else self.prefixes[0]
        found = {}
        for name, tensor, layer in self._entries(config, stored):
            if all(part.param is None or part.param in shapes for part in tensor.parts):  # else it has no such part
                found[name if name.startswith("lm_head") else prefix + name] = Piece(tensor, layer, shapes)
        return found

    def _entries(self, config, stored) -> Iterator[tuple[str, Tensor, int | None]]:
        for name, tensor in self.outside.items():
            yield name, tensor, None
        for place in range(len(config.mixers)):
            for name, tensor in self.block(config, place, stored).items():
                parts = (
                    part if part.param is None else part._replace(param=f"blocks.{place}.{part.param}")
                    for part in tensor.parts
                )
                tensor = dataclasses.replace(tensor, parts=tuple(parts))
                for repeat in range(config.repeat):
                    yield name.format(repeat * len(config.mixers) + place), tensor, repeat


class Piece(NamedTuple):
    """A tensor of one layer, and the shapes of the parameters that it is made of."""

    tensor: Tensor
    layer: int | None  # index along the parameters' first axis; None outside the layers
    shapes: dict[str, tuple[int, ...]]

    def lead(self, part: Part) -> tuple[int, ...]:
        """The part's place along the parameter's first axes."""
        return (() if self.layer is None else (self.layer,)) + part.index

    def core(self, part: Part) -> tuple[int, ...]:
        """The shape of a part."""
        if part.param is None:
            other = next((other for other in self.tensor.parts if other.param is not None), None)
            first = () if other is None else self.core(other)[:-1]
            return (*first, part.columns[1] - part.columns[0])
        shape = self.shapes[part.param][len(self.lead(part)) :]
        return shape if part.columns is None else (*shape[:-1], part.columns[1] - part.columns[0])

    @property
    def joined(self) -> tuple[int, ...]:
        """The shape of the parts side by side."""
        cores = [self.core(part) for part in self.tensor.parts]
        return (*cores[0][:-1], sum(core[-1] for core in cores))

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tensor.stored_shape(self.joined)

    def places(self) -> Iterator[tuple[Part, int]]:
        """The parts, and the column of the joined parts where each begins."""
        at = 0
        for part in self.tensor.parts:
            yield part, at
            at += self.core(part)[-1]
