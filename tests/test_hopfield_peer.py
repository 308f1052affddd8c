"""Parity with hflayers, where it is right: one temperature for all heads, softmax, a fixed number of updates.

Stored, state and value normalisation, projections on and off, the zero pattern and masks are compared.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from engrax.layers import AssociationConfig, Hopfield
from engrax.tests.test_hopfield_layers import build

PLAIN = {f"normalize_{what}{affine}": False for what in ("stored_pattern", "state_pattern", "pattern_projection")
         for affine in ("", "_affine")}  # fmt: skip
PARITY = [
    dict(),
    dict(update_steps_max=3),
    dict(update_steps_max=2, scaling=0.4, add_zero_association=True),
    PLAIN,
    dict(pattern_projection_as_connected=True, update_steps_max=1) | PLAIN,
    dict(stored_pattern_as_static=True, state_pattern_as_static=True, pattern_projection_as_static=True),
]


@pytest.mark.parametrize("theirs", PARITY, ids=range(len(PARITY)))
def test_parity_with_hflayers(theirs, x64):
    torch = pytest.importorskip("torch")
    hflayers = pytest.importorskip("hflayers")
    static = theirs.get("stored_pattern_as_static", False)
    heads = 1 if static else 2  # without projections each of their heads has the whole width
    sizes = {} if static else dict(hidden_size=4, output_size=8, pattern_size=4)
    torch.manual_seed(0)
    peer = (
        hflayers.Hopfield(input_size=8, num_heads=heads, **sizes, **theirs, disable_out_projection=static)
        .double()
        .eval()
    )
    with torch.no_grad():
        for p in peer.parameters():
            p.normal_(std=0.5)
    norm = lambda name: "layer" if theirs.get(f"normalize_{name}", True) else "none"  # noqa: E731
    values = "of_stored" if theirs.get("pattern_projection_as_connected") else "plain" if static else "projected"
    steps = 1 + theirs.get("update_steps_max", 0)
    settings = AssociationConfig(
        heads=heads, head_dim=8 // heads, beta=theirs.get("scaling", 1.0 if static else None), steps=steps,
        values=values, bias=True,
        state_norm=norm("state_pattern"), stored_norm=norm("stored_pattern"), value_norm=norm("pattern_projection"),
        project_state=not static, project_stored=not static, project_output=not static,
        zero_pattern=theirs.get("add_zero_association", False),
    )  # fmt: skip
    ours = build(Hopfield, settings, 8)
    _copy_weights(peer, ours)
    rng = np.random.default_rng(0)
    stored, state, value = rng.normal(size=(2, 6, 8)), rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 6, 8))
    value = stored if values == "of_stored" else value  # theirs projects the values with the patterns' map
    hidden = np.arange(6) >= np.array([[6], [4]])
    as_torch = [torch.from_numpy(x) for x in (stored, state, value)]
    wanted = peer(tuple(as_torch), stored_pattern_padding_mask=torch.from_numpy(hidden)).detach().numpy()
    got = ours(jnp.asarray(state), jnp.asarray(stored), jnp.asarray(value), mask=jnp.asarray(~hidden))
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-10)


def _copy_weights(peer, ours):
    """Copies the published module's parameters; its projections lie below one another, each transposed."""
    core = peer.association_core

    def array(p):
        return jnp.asarray(p.detach().numpy())

    for theirs, mine in (("norm_state_pattern", "state_norm"), ("norm_stored_pattern", "stored_norm"),
                         ("norm_pattern_projection", "value_norm")):  # fmt: skip
        if getattr(ours, mine) is not None:
            getattr(ours, mine).scale[...] = array(getattr(peer, theirs).weight)
            getattr(ours, mine).bias[...] = array(getattr(peer, theirs).bias)
    if core.in_proj_weight is not None:
        parts = jnp.split(array(core.in_proj_weight), 3), jnp.split(array(core.in_proj_bias), 3)
    else:
        kernels = [getattr(core, f"{name}_proj_weight") for name in "qkv"]
        if kernels[0] is None:
            return
        parts = [array(k) for k in kernels], jnp.split(array(core.in_proj_bias), 3)
    for module, kernel, bias in zip((ours.q, ours.k, ours.v), *parts):
        module.kernel[...], module.bias[...] = kernel.T, bias
    ours.out.kernel[...], ours.out.bias[...] = array(core.out_proj.weight).T, array(core.out_proj.bias)
