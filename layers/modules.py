"""Small parts that every mixer and block shares: projections with logical axis names, the gated MLP, l2 norm."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def projection(
    in_features: int, out_features: int, axes: tuple[str, str], *, rngs: nnx.Rngs, scale: float = 1.0
) -> nnx.Linear:
    """A bias-free linear map whose kernel `[in, out]` carries the logical axis names `axes`.

    Initialised normal with standard deviation `scale / sqrt(in)`. It computes in the dtype of its input and kernel.
    """
    init = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
    return nnx.Linear(
        in_features, out_features, use_bias=False, kernel_init=init, kernel_metadata={"axes": axes}, rngs=rngs
    )


def rms_norm(features: int, *, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm over the last axis with a learned scale."""
    return nnx.RMSNorm(features, scale_metadata={"axes": ("norm",)}, rngs=rngs)


def l2_normalise(x: Float[Array, "*B K"], eps: float = 1e-6) -> Float[Array, "*B K"]:
    """x / sqrt(|x|^2 + eps^2) over the last axis, computed in float32 or wider; finite with a finite gradient at 0."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + eps**2)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """SwiGLU: (silu(x W_gate) * x W_up) W_down. Shapes [B, T, D] -> [B, T, D]; hidden width `hidden`."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs, out_scale: float = 1.0):
        self.gate = projection(dim, hidden, ("embed", "mlp"), rngs=rngs)
        self.up = projection(dim, hidden, ("embed", "mlp"), rngs=rngs)
        self.down = projection(hidden, dim, ("mlp", "embed"), rngs=rngs, scale=out_scale)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))
