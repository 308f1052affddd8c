"""Every law can fail: a small mixer that obeys them all, broken in one place at a time, is caught."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from engrax.laws import LAWS, Subject
from engrax.laws.exemptions import check_exemptions
from engrax.layers import MixerConfig
from engrax.layers.common.modules import projection
from engrax.models import LanguageModelConfig


@dataclasses.dataclass(frozen=True)
class DecayConfig(MixerConfig):
    """h_t = sigmoid(gate) h_{t-1} + x_t W, y_t = h_t V; registered nowhere."""

    broken: str = ""  # what is wrong with it
    implementation: str | None = None
    reason: tuple[tuple[str, str], ...] = ()  # exemptions that it claims

    @property
    def exempt_from(self):
        return dict(self.reason)

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return Decay(self, dim, rngs=rngs)


class Decay(nnx.Module):
    def __init__(self, config: DecayConfig, dim: int, *, rngs: nnx.Rngs):
        self.broken = config.broken
        self.wrong = config.broken == "implementation" and config.implementation == "reference"
        self.write = projection(dim, 4, ("embed", "heads"), rngs=rngs)
        self.read = projection(4, dim, ("heads", "embed"), rngs=rngs)
        self.gate_bias = nnx.Param(jnp.linspace(1.0, 3.0, 4))
        self.spare = nnx.Param(jnp.ones(1))

    def init_state(self, batch_size: int) -> dict[str, Any]:
        start = 0.1 if self.broken == "start" else 0.0
        state = {
            "h": jnp.full((batch_size, 4), start, self.gate_bias.dtype),
            "last": jnp.full(batch_size, -1, jnp.int32),
        }
        if self.broken == "no batch axis":
            state["count"] = jnp.zeros((1, 4))
        return state

    def __call__(self, x, state=None, segment_ids=None):
        if state is None:
            state = {"h": jnp.zeros((x.shape[0], 4), self.gate_bias.dtype), "last": jnp.full(x.shape[0], -1, jnp.int32)}
            if self.broken == "no batch axis":
                state["count"] = jnp.zeros((1, 4))
        ids = (
            jnp.broadcast_to(jnp.maximum(state["last"], 0)[:, None], x.shape[:2])
            if segment_ids is None
            else segment_ids
        )
        u = self._inputs(x) * (1 + 1e-6 * (self.broken == "no ids" and segment_ids is None))

        def token(carry, inputs):
            h, last = carry
            u_t, id_t = inputs
            anew = (last >= 0) & (id_t >= 0) & (id_t != last)
            h = jnp.where(anew[:, None], 0, h) if self.broken != "segment leak" else h
            written = (self._decay() * h + u_t).astype(h.dtype)
            h = jnp.where((id_t >= 0)[:, None], written, h) if self.broken != "padding writes" else written
            return (h, jnp.where(id_t >= 0, id_t, last)), h

        carry, h = jax.lax.scan(token, (state["h"], state["last"]), (jnp.moveaxis(u, 1, 0), ids.T))
        y = jnp.where((ids >= 0)[..., None], self.read(jnp.moveaxis(h, 0, 1)), 0) * (1 + 1e-6 * self.wrong)
        spare = 0.0 if self.broken == "dead parameter" else self.spare[...]
        return y * (1 + spare), self._state_after(carry, state, x)

    def _decay(self):
        gate = self.gate_bias[...]
        if self.broken == "log of a gate":  # right in value, but its gradient at exact 0 is 0 * inf
            return jnp.exp(jnp.log(jax.nn.sigmoid(gate)))
        if self.broken == "division by a gate":
            return jax.nn.sigmoid(gate) / jax.nn.sigmoid(gate) * jax.nn.sigmoid(gate)
        return jax.nn.sigmoid(gate)

    def _inputs(self, x):
        u = self.write(x)
        if self.broken == "future leak":
            u = u + 1e-6 * jnp.roll(u, -1, axis=1)
        if self.broken == "batch mixing":
            u = u + 1e-6 * jnp.mean(u, axis=0, keepdims=True)
        if self.broken == "batch position":
            u = u * (1 + 1e-6 * jnp.arange(x.shape[0])[:, None, None])
        if self.broken == "phase not carried":
            u = u * (1 + 1e-6 * (jnp.arange(x.shape[1]) % 4))[:, None]
        if self.broken == "blind":
            u = jnp.concatenate([0 * u[:, :1], u[:, :-1]], axis=1)
        if self.broken == "stopped gradient":
            u = u + jax.lax.stop_gradient(0.1 * u)
        return u

    def _state_after(self, carry, state, x):
        after = state | {"h": carry[0], "last": carry[1]}
        if self.broken == "dropped state":
            after["h"] = jnp.zeros_like(carry[0])
        if self.broken == "forgotten segment":
            after["last"] = jnp.full_like(carry[1], -1)
        if self.broken == "growing state":
            after["seen"] = x
        if self.broken == "changing dtype":
            after["h"] = after["h"].astype(jnp.float32)
        if self.broken == "stopped carry":
            after["h"] = jax.lax.stop_gradient(after["h"])
        return after


CAUGHT = {  # what is broken -> laws that must notice
    "growing state": ("state.shapes",),
    "changing dtype": ("state.shapes",),
    "no batch axis": ("state.shapes",),
    "no ids": ("state.one_segment",),
    "start": ("state.start", "paths.steps"),
    "dropped state": ("paths.steps", "state_carry.blocks", "state_carry.cuts"),
    "phase not carried": ("paths.steps", "state_carry.blocks", "state_carry.cuts"),
    "forgotten segment": ("paths.steps", "state_carry.blocks"),
    "stopped carry": ("paths.gradients",),
    "implementation": ("paths.implementations",),
    "future leak": ("causality.finite_change", "causality.jacobian"),
    "blind": ("causality.finite_change", "causality.jacobian"),
    "batch mixing": ("independence.rows", "independence.batch_size"),
    "batch position": ("independence.rows", "independence.batch_size"),
    "padding writes": ("independence.padding", "packing.apart"),
    "segment leak": ("packing.apart", "packing.gradients"),
    "dead parameter": ("trainability.gradients",),
    "stopped gradient": ("trainability.finite_differences",),
    "log of a gate": ("stability.gradients",),
    "division by a gate": ("stability.long", "stability.gradients"),
}


@functools.lru_cache(maxsize=1)
def subject(broken: str) -> Subject:
    return Subject(DecayConfig(broken), thorough=not broken)  # the fewer programs must catch it too


@functools.lru_cache(maxsize=1)
def model(broken: str) -> Subject:
    return Subject(LanguageModelConfig(vocab_size=16, dim=8, mixers=(DecayConfig(broken),), repeat=1, mlp_hidden=0))


def test_every_law_has_something_that_breaks_it():
    assert {name for names in CAUGHT.values() for name in names} == set(LAWS)


@pytest.mark.parametrize("name", LAWS)
def test_the_sound_mixer_obeys(name, x64):
    LAWS[name](subject(""))


@pytest.mark.parametrize("broken, name", [(broken, name) for broken, names in CAUGHT.items() for name in names])
def test_a_broken_mixer_is_caught(broken, name, x64):
    s = subject(broken)
    with pytest.raises(AssertionError) as caught:
        LAWS[name](s)
    print(caught.value)


@pytest.mark.parametrize(
    "broken, name",
    [
        ("future leak", "causality.finite_change"),
        ("future leak", "causality.jacobian"),
        ("batch mixing", "independence.rows"),
        ("segment leak", "packing.apart"),
        ("segment leak", "packing.gradients"),
        ("forgotten segment", "state_carry.blocks"),
        ("dead parameter", "trainability.gradients"),
    ],
)
def test_a_broken_mixer_is_caught_inside_a_model(broken, name, x64):
    s = model(broken)
    with pytest.raises(AssertionError) as caught:
        LAWS[name](s)
    print(caught.value)


def test_an_exemption_must_be_earned(x64):
    paper = (("causality", "the paper mode sees its whole segment"),)
    check_exemptions(Subject(DecayConfig("future leak", reason=paper)))
    with pytest.raises(AssertionError, match="which it obeys"):
        check_exemptions(Subject(DecayConfig(reason=paper)))
    with pytest.raises(AssertionError, match="not an exemption that exists"):
        check_exemptions(Subject(DecayConfig("batch mixing", reason=(("independence", "the paper mixes rows"),))))
    with pytest.raises(AssertionError, match="no law"):
        check_exemptions(Subject(DecayConfig(reason=(("causalty", "the paper mode"),))))
