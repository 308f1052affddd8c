"""Parameters of one model as those of another: layers with branches or other mixers, adapters, a larger vocabulary.

A layer's parameters go to the layer with the same number. A mixer that takes attention's place gets its q, k, v and o,
keys and values copied to every query head (as in arXiv 2408.15237). New rows of a vocabulary are the mean of the old
ones, so that no new word takes much of the probability.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from engrax.errors import UserError
from engrax.layers.common.branched import BranchedConfig
from engrax.layers.common.lora import LoraConfig
from engrax.layers.mixer import MixerConfig
from engrax.models.language_model import LanguageModelConfig

Path = tuple[Any, ...]  # of a parameter: ("blocks", 0, "mixer", "q", "kernel")
HANDED = ("q", "k", "v", "qkv", "out")  # projections that a mixer of another class takes over
VOCABULARY = ("embedding", "output_embedding")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: for every layer of its stack, or once, the parameters that lie side by side in
    it."""

    parts: tuple[tuple[tuple[Path, int | None], ...], ...]  # per layer: (source parameter, its index in the stack)
    head_dim: int = 0  # width of a head, by which narrower keys and values are copied


def plain(config: LanguageModelConfig, vocab_size: int) -> LanguageModelConfig:
    """The model without changed layers, adapters and added rows of its vocabulary: what a checkpoint holds."""
    return dataclasses.replace(config, layers=(), lora=LoraConfig(), frozen=False, vocab_size=vocab_size)


def origins(
    source: LanguageModelConfig, target: LanguageModelConfig, given: set[Path], wanted: list[Path], at: Path = ()
) -> dict[Path, Origin]:
    """The origin of every parameter of the target that the source has; `given` and `wanted` are their paths, `at` is
    the path of both models in them. Parameters outside go to those of the same path."""
    stacks = (*at, "blocks")
    start = len(stacks)
    held: dict[int, set[Path]] = {}
    for path in given:
        if path[:start] == stacks:
            held.setdefault(path[start], set()).add(path[start + 1 :])
    where = {layer: (i, row) for i, stack in enumerate(source.stacks) for row, layer in enumerate(stack.layers)}
    found = {}
    for path in wanted:
        if path[:start] != stacks:
            found |= {path: Origin((((path, None),),))} if path in given else {}
            continue
        stack, parts = target.stacks[path[start]], []
        for layer in stack.layers if max(stack.layers) in where else ():
            i, row = where[layer]
            old, new = _main(source.stacks[i].mixer), _main(stack.mixer)
            names = _names(path[start + 1 :], held[i], type(old) is not type(new))
            parts.append(tuple(((*stacks, i, *name), row) for name in names))
        if parts and all(parts):
            found[path] = Origin(tuple(parts), getattr(old, "head_dim", 0))
    return found


def _main(mixer: MixerConfig) -> MixerConfig:
    return mixer.main if isinstance(mixer, BranchedConfig) else mixer


def _names(name: Path, held: set[Path], exchanged: bool) -> tuple[Path, ...]:
    """The parameters of a source's block that make up the parameter `name` of the target's; () for a new one."""
    if name[0] != "mixer":
        return (name,) if name in held else ()
    unbranched = ("mixer", *name[2:]) if name[1] == "main" else name
    branched = ("mixer", "main", *name[1:])
    for candidate in (name, unbranched, branched):
        own = candidate[2] if candidate[1] == "main" else candidate[1]
        if candidate in held and (not exchanged or own in HANDED):
            return (candidate,)
        if own == "qkv" and candidate[-1] == "kernel":
            apart = tuple((*candidate[:-2], part, "kernel") for part in "qkv")
            if held.issuperset(apart):
                return apart
    return ()


def hand_over(
    source: LanguageModelConfig,
    target: LanguageModelConfig,
    given: dict[Path, Array],
    like: dict[Path, jax.ShapeDtypeStruct],
    at: Path = (),
) -> dict[Path, Array]:
    """The target's parameters that the source has, with the dtypes and shardings of `like`; `at` as in `origins`.

    What is handed over leaves `given`, so that little is held twice. Raises UserError if widths do not fit.
    """
    found = {}
    plan = origins(source, target, set(given), list(like), at)
    left = [path for origin in plan.values() for part in origin.parts for path, _ in part]
    for path, origin in plan.items():
        used = list(dict.fromkeys(name for part in origin.parts for name, _ in part))
        want = like[path]
        _check(path, origin, {name: given[name].shape for name in used}, want.shape)
        build = functools.partial(_assemble, origin, path[-1], want.shape, want.dtype, used)
        found[path] = jax.jit(build, out_shardings=want.sharding)(*(given[name] for name in used))
        for part in origin.parts:
            for name, _ in part:
                left.remove(name)
        for name in used:
            if name not in left:
                del given[name]
    return found


def _assemble(origin: Origin, name: Any, shape: tuple[int, ...], dtype: Any, used: list[Path], *arrays: Array) -> Array:
    """A parameter of the target from those of the source."""
    held, layers = dict(zip(used, arrays)), []
    for parts in origin.parts:
        pieces = [held[path] if row is None else held[path][row] for path, row in parts]
        if name == "kernel":  # keys and values of fewer heads, and q, k and v side by side
            width = shape[-1] // len(pieces)
            pieces = [jnp.concatenate([_copied(piece, width, origin.head_dim) for piece in pieces], axis=-1)]
        layers.append(pieces[0])
    value = layers[0] if origin.parts[0][0][1] is None else jnp.stack(layers)
    if name in VOCABULARY and len(value) < shape[0]:
        mean = jnp.mean(value.astype(jnp.float32), axis=0, keepdims=True).astype(value.dtype)
        value = jnp.concatenate([value, jnp.broadcast_to(mean, (shape[0] - len(value), value.shape[1]))])
    return value.astype(dtype)


def _copied(piece: Array, width: int, head_dim: int) -> Array:
    """Every head of a projection [..., heads * head_dim] repeated until it is `width` wide."""
    if width == piece.shape[-1]:
        return piece
    heads = piece.reshape(*piece.shape[:-1], -1, head_dim)
    return jnp.repeat(heads, width // piece.shape[-1], axis=-2).reshape(*piece.shape[:-1], width)


def _check(path: Path, origin: Origin, shapes: dict[Path, tuple[int, ...]], wanted: tuple[int, ...]) -> None:
    """Raises UserError unless `_assemble` gives the shape wanted."""
    (first, row), *others = origin.parts[0]
    cores = [shapes[name] if at is None else shapes[name][1:] for name, at in origin.parts[0]]
    core = wanted if row is None else wanted[1:]
    if path[-1] in VOCABULARY:
        fits = cores[0][0] <= core[0] and cores[0][1:] == core[1:]
    elif others:  # q, k and v side by side
        narrow = [c[-1] for c in cores]
        fits = core[-1] == 3 * narrow[0] and all(narrow[0] % n == 0 for n in narrow) and cores[0][:-1] == core[:-1]
    else:
        fits = cores[0] == core or _widened(path, first, cores[0], core)
    if not fits:
        held = " + ".join(str(list(c)) for c in cores)
        raise UserError(
            f"{'.'.join(map(str, path))} is {list(core)}, and what it should start from ({'.'.join(map(str, first))}) "
            f"{held}; choose the same heads, head_dim and value_dim, or the same sizes."
        )


def _widened(path: Path, first: Path, core: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether keys or values of another class of mixer are narrower by a whole factor."""
    exchanged = path[-2:-1] in (("k",), ("v",)) and first[-1] == "kernel"
    return exchanged and core[:-1] == wanted[:-1] and wanted[-1] % core[-1] == 0


def told(paths: set[Path], all_paths: set[Path]) -> Iterator[str]:
    """The names of parameters, a part of the model by its own name if all its parameters are among them."""
    rest = set(paths)
    while rest:
        path = min(rest, key=lambda p: tuple(map(str, p)))
        for length in range(1, len(path) + 1):
            inside = {p for p in all_paths if p[:length] == path[:length]}
            if inside <= paths:
                yield ".".join(map(str, path[:length]))
                rest -= inside
                break
