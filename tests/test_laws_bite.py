"""Every law can fail: a small mixer that obeys them all, broken in one place at a time, is caught."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from engrax.laws import LAWS, Breach, Subject
from engrax.laws.exemptions import check_exemptions
from engrax.models import LanguageModelConfig
from engrax.tests.broken_mixers import FAULTS, GatedDecay, GatedDecayConfig

CAUGHT = {  # what is broken -> laws that must notice
    "no batch axis": ("state.shapes",),
    "no ids": ("state.one_segment",),
    "start": ("state.start", "state_carry.steps"),
    "phase not carried": ("state_carry.steps", "state_carry.blocks", "state_carry.cuts"),
    "segment forgotten": ("state_carry.steps", "state_carry.blocks", "packing.apart"),
    "stopped carry": ("state_carry.gradients",),
    "cut inside padding": ("state_carry.padding",),
    "cut inside filler": ("state_carry.padding",),
    "implementation": ("paths.implementations",),
    "next token": ("causality.finite_change", "causality.jacobian", "causality.distance"),
    "deaf": ("causality.finite_change", "causality.jacobian"),
    "rows mixed": ("independence.rows", "independence.batch_size", "independence.gradients"),
    "batch position": ("independence.rows", "independence.batch_size"),
    "padding written": ("padding.content", "padding.nothing"),
    "documents leak at once": ("packing.apart", "packing.gradients", "packing.slow_decay"),
    "stopped gradient": ("trainability.finite_differences",),
    "log of a gate": ("stability.gradients",),
    "division by a gate": ("stability.long", "stability.gradients"),
}


@dataclasses.dataclass(frozen=True)
class BrokenConfig(GatedDecayConfig):
    """The gated decay with faults that need more than another input; registered nowhere."""

    implementation: str | None = None
    reason: tuple[tuple[str, str], ...] = ()  # exemptions that it claims

    @property
    def exempt_from(self):
        return dict(self.reason)

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return Broken(self, dim, rngs=rngs)


class Broken(GatedDecay):
    """The module of BrokenConfig."""

    def __init__(self, config, dim, *, rngs):
        super().__init__(config, dim, rngs=rngs)
        self.wrong = config.fault == "implementation" and config.implementation == "reference"
        if self.fault == "documents leak at once":
            self.bias[...] = jnp.full_like(self.bias[...], 1.0)

    def init_state(self, batch_size):
        state = super().init_state(batch_size)
        if self.fault == "start":
            state["h"] = state["h"] + 0.1
        if self.fault == "no batch axis":
            state["count"] = jnp.zeros((1, 4))
        return state

    def __call__(self, x, state=None, segment_ids=None):
        if state is None and self.fault == "start":
            state = super().init_state(len(x))
        y, after = super().__call__(x, state, segment_ids)
        scale = 1 + 1e-6 * (self.wrong or self.fault == "no ids" and segment_ids is None)
        if self.fault == "stopped carry":
            after["h"] = jax.lax.stop_gradient(after["h"])
        if self.fault == "cut inside padding" and segment_ids is not None:  # a call of padding alone forgets
            after["h"] = jnp.where(jnp.any(segment_ids >= 0, axis=1)[:, None], after["h"], 0)
        if self.fault == "cut inside filler" and segment_ids is not None:  # a call that ends with filler forgets
            after["h"] = jnp.where((segment_ids[:, -1] == -2)[:, None], 0, after["h"])
        return y * scale, after

    def _leaking(self, u):
        u = super()._leaking(u)
        if self.fault == "batch position":
            return u * (1 + 1e-6 * jnp.arange(u.shape[0])[:, None, None])
        if self.fault == "phase not carried":
            return u * (1 + 1e-6 * (jnp.arange(u.shape[1]) % 4))[:, None]
        if self.fault == "deaf":
            return 0 * u
        if self.fault == "stopped gradient":
            return u + jax.lax.stop_gradient(0.1 * u)
        return u

    def _decay(self, logits):
        if self.fault == "log of a gate":  # right in value, but its gradient at exact 0 is 0 * inf
            return jnp.exp(jnp.log(jax.nn.sigmoid(logits)))
        if self.fault == "division by a gate":
            return jax.nn.sigmoid(logits) / jax.nn.sigmoid(logits) * jax.nn.sigmoid(logits)
        return super()._decay(logits)


@functools.lru_cache(maxsize=1)
def subject(fault: str) -> Subject:
    return Subject(BrokenConfig(fault), thorough=not fault)  # the fewer programs must catch it too


@functools.lru_cache(maxsize=1)
def model(fault: str) -> Subject:
    return Subject(LanguageModelConfig(vocab_size=16, dim=8, mixers=(BrokenConfig(fault),), repeat=1, mlp_hidden=0))


def test_every_law_has_something_that_breaks_it():
    found = {fault.law for fault in FAULTS.values()}  # by `engrax check`, in test_check.py
    assert found | {name for names in CAUGHT.values() for name in names} == set(LAWS)


@pytest.mark.parametrize("name", LAWS)
def test_the_sound_mixer_obeys(name, x64):
    LAWS[name](subject(""))


@pytest.mark.parametrize("fault, name", [(fault, name) for fault, names in CAUGHT.items() for name in names])
def test_a_broken_mixer_is_caught(fault, name, x64):
    s = subject(fault)
    with pytest.raises(Breach) as caught:
        LAWS[name](s)
    assert caught.value.law == name
    print(caught.value)


@pytest.mark.parametrize(
    "fault, name",
    [
        ("next token", "causality.finite_change"),
        ("next token", "causality.jacobian"),
        ("rows mixed", "independence.rows"),
        ("documents leak at once", "packing.apart"),
        ("documents leak at once", "packing.gradients"),
    ],
)
def test_a_broken_mixer_is_caught_inside_a_model(fault, name, x64):
    s = model(fault)
    with pytest.raises(Breach) as caught:
        LAWS[name](s)
    print(caught.value)


def test_an_exemption_must_be_earned(x64):
    paper = (("causality", "the paper mode sees its whole segment"),)
    check_exemptions(Subject(BrokenConfig("next token", reason=paper)))
    with pytest.raises(Breach, match="which it obeys"):
        check_exemptions(Subject(BrokenConfig(reason=paper)))
    with pytest.raises(Breach, match="not an exemption that exists"):
        check_exemptions(Subject(BrokenConfig("rows mixed", reason=(("independence", "the paper mixes rows"),))))
    with pytest.raises(Breach, match="no law"):
        check_exemptions(Subject(BrokenConfig(reason=(("causalty", "the paper mode"),))))
