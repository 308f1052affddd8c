"""Which part of which tensor every parameter is, and reading those parts alone."""

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np

from engrax.errors import UserError
from engrax.models.imported.files import DTYPES, TensorFiles
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published import Format, Piece

ROWS = 4096  # rows of an embedding that are compared at a time


class Use(NamedTuple):
    """A tensor that has columns of a parameter, for one place along the parameter's first axes."""

    name: str  # the tensor's
    piece: Piece
    start: int  # the columns of the parameter
    stop: int
    offset: int  # where they begin in the parts of the tensor side by side


class Plan:
    """Maps the tensors of a folder to parts of a model's parameters. `shapes` maps parameter names to shapes.

    Raises UserError naming tensors that are missing, unknown, of the wrong shape, or not floats of at most 32 bits.
    """

    def __init__(
        self, files: TensorFiles, form: Format, config: LanguageModelConfig, shapes: dict[str, tuple[int, ...]]
    ):
        self.files, self.shapes = files, shapes
        layers = max((shape[0] for name, shape in shapes.items() if name.startswith("blocks.")), default=0)
        if layers > len(files.infos):  # each layer has its own tensors; a huge number would fill the memory
            raise UserError(f"{files.folder}: config.json asks for {layers} layers of {len(files.infos)} tensors.")
        stored = {name: info.shape for name, info in files.infos.items()}
        self.pieces = form.pieces(_in_pattern_of(config, shapes), shapes, stored)
        self.tied = [f"{p}lm_head.weight" for p in ("", *form.prefixes) if "output_embedding" not in shapes]
        self.params: dict[str, dict[tuple[int, ...], list[Use]]] = {}
        for name, piece in self.pieces.items():
            for part, offset in piece.places():
                if part.param is not None:
                    start, stop = part.columns or (0, piece.core(part)[-1])
                    uses = self.params.setdefault(part.param, {}).setdefault(piece.lead(part), [])
                    uses.append(Use(name, piece, start, stop, offset))
        self._check(form)

    def _check(self, form: Format) -> None:
        infos, folder = self.files.infos, self.files.folder
        missing = [name for name in self.pieces if name not in infos]
        if missing:
            raise UserError(f"{folder} lacks the tensor{_several(missing)} that its config.json asks for.")
        known = {*self.pieces, *self.tied}
        ends, begins = form.skipped or ("\0",), form.others or ("\0",)
        unknown = [name for name in infos if name not in known and not (name.endswith(ends) or name.startswith(begins))]
        if unknown:
            raise UserError(f"{folder} holds the tensor{_several(unknown)} unknown to the model of its config.json.")
        for name in (*self.pieces, *(tied for tied in self.tied if tied in infos)):
            shape = self.pieces[name].shape if name in self.pieces else self.shapes["embedding"]
            if infos[name].shape != shape:
                raise UserError(
                    f"{folder}: tensor {name} has shape {list(infos[name].shape)}, config.json asks for {list(shape)}."
                )
            if infos[name].dtype not in DTYPES:
                raise UserError(
                    f"{folder}: tensor {name} is of dtype {infos[name].dtype}, which is not supported "
                    f"(known: {', '.join(DTYPES)})."
                )

    def check_values(self) -> None:
        """Raises UserError if the head stored with a tied embedding is a different matrix, or if what must be zero
        is not."""
        table = self.params["embedding"][()][0].name
        for name in self.tied:
            rows = range(0, self.shapes["embedding"][0] if name in self.files.infos else 0, ROWS)
            parts = [(slice(start, start + ROWS),) for start in rows]
            if not all(np.array_equal(self.files.read(name, part), self.files.read(table, part)) for part in parts):
                raise UserError(
                    f"{self.files.folder}: config.json ties the head to the embedding, but {name} is not {table}."
                )
        for name, piece in self.pieces.items():
            for part, offset in piece.places():
                if part.param is None and self._whole(name, piece)[..., offset : offset + piece.core(part)[-1]].any():
                    raise UserError(f"{self.files.folder}: {name} is not zero where engrax has no parameter for it.")

    def read(self, param: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """A slice of a parameter, read from its tensors."""
        uses, shape = self.params[param], self.shapes[param]
        lead = len(next(iter(uses)))
        spans = [slice(*part.indices(size)[:2]) for part, size in zip(index, shape)]
        value = np.empty([span.stop - span.start for span in spans], dtype)
        for at in itertools.product(*(range(span.stop - span.start) for span in spans[:lead])):
            place = tuple(i + span.start for i, span in zip(at, spans))
            for use in uses[place]:
                self._read_columns(use, spans[lead:], value[at])
        return value

    def _read_columns(self, use: Use, spans: list[slice], value: np.ndarray) -> None:
        """Fills the columns of `value`, a slice of one core of the parameter, that the tensor has."""
        first, last = max(spans[-1].start, use.start), min(spans[-1].stop, use.stop)
        if first >= last:
            return
        columns = slice(first - use.start + use.offset, last - use.start + use.offset)
        index, tensor = (*spans[:-1], columns), use.piece.tensor
        if tensor.is_plain:
            index = index[::-1] if tensor.form == "matrix" else index
            read = self.files.read(use.name, index)
            found = dataclasses.replace(tensor, parts=tensor.parts[:1]).unpack(read, _unpacked(read.shape, tensor))
        else:
            found = self._whole(use.name, use.piece)[index]
        value[..., first - spans[-1].start : last - spans[-1].start] = found

    def _whole(self, name: str, piece: Piece) -> np.ndarray:
        """The parts of a tensor side by side."""
        return piece.tensor.unpack(self.files.read(name), piece.joined)


def _unpacked(shape: tuple[int, ...], tensor: Any) -> tuple[int, ...]:
    return shape[::-1] if tensor.form == "matrix" else shape


def _in_pattern_of(config: LanguageModelConfig, shapes: dict[str, tuple[int, ...]]) -> LanguageModelConfig:
    """The config with the pattern of a model that may repeat it within its own, from its parameters."""
    places = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=0)
    mixers = list(config.mixers) * config.repeat
    norms = [config.layout.place_of(i) for i in range(len(config.mixers))] * config.repeat
    layout = dataclasses.replace(config.layout, norm_places=tuple(norms[:places]))
    return dataclasses.replace(config, mixers=tuple(mixers[:places]), repeat=len(mixers) // places, layout=layout)


def _several(names: list[str]) -> str:
    """` a`, or `s a, b and 7 more`."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"
