"""Which law runs on which config in `make test`, in `make test-deep`, and in `make test-long`."""

import inspect

import pytest

from engrax.laws import LAWS

# Compilation is nearly the whole cost of a law. `make test` runs all laws on the foundations of everything else.
# Elsewhere it leaves out laws that need their own programs, rows without segment ids, all but the first example of a
# config, gradients if a config resembles another that is tested in full, and most laws of configs that are only
# settings of another config's module. `make test-deep` adds the other examples, nearly all laws of cheap configs, and
# for the first example of a costly config the laws of causality, rows, packing and state that share programs.
# `make test-long` runs the rest, and with `deep=True` every law whose body then does more: rows with and without
# segment ids, more cuts, gradients of implementations.
DEEP_ONLY = ("causality.distance",)  # rows of 3072 tokens
OWN_PROGRAMS = ("state_carry.gradients", "state_carry.cuts", "state_carry.padding", "independence.batch_size")
OWN_PROGRAMS += ("stability.long", "state.start")
COSTLY = ("test_time", "routed", "prefix_linear_attention")  # tens of seconds for all laws; models too
OF_COSTLY = ("state.shapes", "state.one_segment", "state_carry.steps")  # and NO_GRADIENTS
OWN_OF_COSTLY = ("state.shapes", "state.one_segment", "trainability.finite_differences", "padding.nothing")
FOUNDATIONS = ("attention", "linear_attention", "titans")
THOROUGH = ("attention", "linear_attention")  # with rows of every layout; the others in `make test-long`
FEW_PROGRAMS = ("causality.finite_change", "independence.rows", "padding.content")
NO_GRADIENTS = (*FEW_PROGRAMS, "state_carry.blocks", "packing.apart", "packing.slow_decay")
HYBRIDS = ("titans_mac", "titans_mag", "titans_mal")  # of two mixers that are tested in full
RELATIVES = ("titans_mac", "titans_mag", "titans_mal", "retnet", "lightning", "hgrn2", "mamba2", "rebased")
RELATIVES += ("infini_attention", "hopfield_layer", "memorizing", "transformer_xl", "armt", "rmt")
RELATIVES += ("deltanet", "kda", "gla", "based", "gsa", "gated_convolution", "hopfield_pooling")
GRADIENTS = ("causality.jacobian", "packing.gradients", "stability.gradients", "trainability.gradients")
GRADIENTS += ("independence.gradients",)
# Laws with their own programs; after a config's first example they run only in `make test-long`.
OF_FIRST = (*GRADIENTS, "trainability.finite_differences", "padding.nothing", "causality.distance", "state.one_segment")
OF_FIRST_COSTLY = ("packing.gradients", "trainability.gradients")
SETTINGS_LEFT_OUT = ("ttt_mlp", "yaad", "moneta", "memora", "omeganet", "atlas", "lact")  # of test_time_memory
MODELS_LEFT_OUT = ("titans_lmm", "titans_mac", "titans_mag", "titans_mal", "transformer_xl", "memorizing_transformer")


def is_thorough(name: str, index: int) -> bool:
    """Whether the config is one that `make test` tests in full."""
    return not index and name in THOROUGH


def _marks(registry, name: str, index: int, part: str) -> list:
    if not _is_left_out(registry, name, index, part):
        return []
    return [pytest.mark.deep if _is_deep(registry, name, index, part) else pytest.mark.long]


def _is_deep(registry, name: str, index: int, part: str) -> bool:
    """Whether a case that `make test` leaves out is one of `make test-deep`."""
    if part in OWN_PROGRAMS or (index and part in OF_FIRST):
        return False
    if registry.kind == "mixer" and not any(word in registry[name].__module__ for word in COSTLY):
        return True
    if name in FOUNDATIONS and not index:
        return True
    if part == "causality.distance":
        return registry.kind == "mixer" and not index and not _is_setting(registry[name], registry)
    if index and name not in FOUNDATIONS:
        return False
    if part in NO_GRADIENTS:
        return True
    if _is_setting(registry[name], registry):
        return False
    return part in OF_COSTLY or (part in OF_FIRST_COSTLY and not index and name not in RELATIVES)


def _does_more_when_deep(part: str) -> bool:
    """Whether the body of a law reads its argument `deep`."""
    return inspect.getsource(inspect.unwrap(LAWS[part])).count("deep") > 1


def _is_left_out(registry, name: str, index: int, part: str) -> bool:
    """Whether `make test` leaves the case out."""
    if index or part in DEEP_ONLY:
        return True
    if name in FOUNDATIONS:
        costly = (*OWN_PROGRAMS, *OWN_OF_COSTLY, *GRADIENTS)
        return name == "titans" and part in costly  # they take a minute
    if _is_setting(registry[name], registry):
        return name in SETTINGS_LEFT_OUT + MODELS_LEFT_OUT or part not in FEW_PROGRAMS
    if registry.kind == "mixer" and name in HYBRIDS:
        return part not in FEW_PROGRAMS
    if name in RELATIVES:
        return part not in NO_GRADIENTS
    if part in ("independence.gradients", "stability.gradients"):
        return True
    costly = registry.kind == "model" or any(word in registry[name].__module__ for word in COSTLY)
    if costly and part in (*GRADIENTS, *OWN_OF_COSTLY):
        return True
    return part in OWN_PROGRAMS


def _is_setting(config: type, registry) -> bool:
    """Whether another registered config builds the same module."""
    others = (other for other in registry.values() if other is not config)
    return any(issubclass(config, other) and config.build is other.build for other in others)


def cases(registry):
    """pytest parameters (kind, name, index, law, deep), ordered by config, so that what one compiled can be dropped."""
    found, kind = [], registry.kind
    for name in (name for name in registry if registry[name].__module__.startswith("engrax.")):
        for index in range(len(registry[name].examples())):
            case = f"{kind}-{name}{index}"
            for part in LAWS:
                marks = _marks(registry, name, index, part)
                found.append(pytest.param(kind, name, index, part, False, marks=marks, id=f"{case}-{part}"))
            for part in filter(_does_more_when_deep, LAWS):
                marks = [pytest.mark.long]
                found.append(pytest.param(kind, name, index, part, True, marks=marks, id=f"{case}-{part}-deep"))
    return found
