"""Small parts shared by mixers and blocks: projections with logical axis names, norms, MLPs."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.tensor import mean_of_shares, summed


def _product(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _product_bwd(operands, y_bar):
    x, kernel = operands
    tokens = tuple(range(x.ndim - 1))
    x_bar = jax.lax.dot_general(y_bar, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    return x_bar, jax.lax.dot_general(x, y_bar, ((tokens, tokens), ((), ())))


def _wide_product(x: Float[Array, "*B I"], kernel: Float[Array, "I O"]) -> Float[Array, "*B O"]:
    """x W with unconverted operands, accumulated and returned in float32 or wider."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=wide)


def _wide_product_bwd(operands, y_bar):
    x, kernel = operands
    x_bar, kernel_bar = _product_bwd([a.astype(y_bar.dtype) for a in operands], y_bar)
    return x_bar.astype(x.dtype), kernel_bar.astype(kernel.dtype)


def _differentiable(product, bwd):
    """The product x W, with the derivative by W as the product x^T y, [I, O]. Automatic differentiation would transpose
    y^T x. XLA's CPU code then transposes y and the computation of y, at half the speed.

    The forward pass under differentiation calls the bare product, so remat policies see a product and can save it.
    """
    multiply = jax.custom_vjp(product)
    multiply.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), bwd)
    return multiply


_matmul = _differentiable(_product, _product_bwd)
_matmul_wide = _differentiable(_wide_product, _wide_product_bwd)


SHARED = ("heads", "mlp")  # names of axes that are split where devices hold shares of a layer


class Projection(nnx.Linear):
    """x W + b over the last axis. The product has the dtype of input and kernel, independent of the bias's dtype.

    Where devices hold shares of heads or of hidden channels, the products from these to the model's width are summed.

    wide: the product stays in the accumulator's dtype, float32 or wider: for the gates of a memory.
    """

    wide: bool = False

    def __call__(self, inputs: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        kernel = self.kernel[...]
        dtype = jnp.promote_types(inputs.dtype, kernel.dtype)
        y = (_matmul_wide if self.wide else _matmul)(inputs.astype(dtype), kernel.astype(dtype))
        y = summed(y) if (self.kernel.get_metadata().get("axes") or (None,))[-2:][0] in SHARED else y
        return y if self.bias is None else (y + self.bias[...]).astype(y.dtype)


def projection(
    in_features: int,
    out_features: int,
    axes: tuple[str, str],
    *,
    rngs: nnx.Rngs,
    scale: float = 1.0,
    bias: bool = False,
    wide: bool = False,
    widths: tuple[int, ...] | None = None,
    parts: tuple[int, ...] | None = None,
) -> Projection:
    """A linear map whose kernel `[in, out]` carries the logical axis names `axes`.

    Initialised normal with standard deviation `scale / sqrt(in)`, a bias at zero. It computes in the dtype of its input
    and kernel; `wide`, for the gates of a memory, returns float32 or wider. `widths`: the outputs of maps that lie side
    by side in one kernel, as queries, keys and values; None = one map. `parts`: the same where optimizers take them as
    one map, as the gates of a head; None = `widths`.
    """
    init = nnx.initializers.variance_scaling(scale**2, "fan_in", "normal")
    made = Projection(
        in_features,
        out_features,
        use_bias=bias,
        kernel_init=init,
        kernel_metadata={"axes": axes, "role": "matrix"}
        | {name: value for name, value in {"widths": widths, "parts": parts}.items() if value},
        bias_metadata={"axes": axes[1:], "role": "bias"},
        rngs=rngs,
    )
    made.wide = wide
    return made


_NORM = {"axes": ("norm",), "role": "norm"}


class RMSNorm(nnx.RMSNorm):
    """Flax's RMSNorm, with the dtype of its input although the scale is float32.

    One over all heads takes the mean over all devices where these hold shares of the heads.
    """

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        if self.scale.get_metadata()["axes"][-1] not in SHARED:
            return super().__call__(x).astype(x.dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = mean_of_shares(jnp.mean(wide * wide, axis=-1, keepdims=True))
        return (wide * (jax.lax.rsqrt(mean + self.epsilon) * self.scale[...])).astype(x.dtype)


class LayerNorm(nnx.LayerNorm):
    """Flax's LayerNorm, with the dtype of its input although scale and bias are float32."""

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return super().__call__(x).astype(x.dtype)


def rms_norm(features: int, *, rngs: nnx.Rngs, eps: float = 1e-6, axis: str = "norm") -> RMSNorm:
    """RMSNorm over the last axis with a learned scale; axis: its name, "heads" where it runs over all heads."""
    return RMSNorm(features, epsilon=eps, scale_metadata={"axes": (axis,), "role": "norm"}, rngs=rngs)


def layer_norm(features: int, *, rngs: nnx.Rngs, eps: float = 1e-5) -> LayerNorm:
    """LayerNorm over the last axis with a learned scale and bias; its variance is a mean of squares around the mean."""
    return LayerNorm(
        features, epsilon=eps, use_fast_variance=False, scale_metadata=_NORM, bias_metadata=_NORM, rngs=rngs
    )


NORMS = {"rms": rms_norm, "layer": layer_norm}
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def l2_normalise(x: Float[Array, "*B K"], eps: float = 1e-6) -> Float[Array, "*B K"]:
    """(1 - m) x / sqrt(|x|^2 + eps^2) over the last axis, computed in float32 or wider, finite at 0 with its gradient.

    The margin m is the largest relative error of rounding to x's dtype, so the rounded vector has a length of at most
    1. Delta rules and test-time memories stay bounded only for such keys.
    """
    wide_dtype = jnp.promote_types(x.dtype, jnp.float32)
    wide = x.astype(wide_dtype)
    margin = 4 * jnp.finfo(wide_dtype).eps + (jnp.finfo(x.dtype).eps / 2 if x.dtype != wide_dtype else 0)
    return ((1 - margin) * wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + eps**2)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """(act(x W_gate) * x W_up) W_down, SwiGLU by default. Shapes [B, T, D] -> [B, T, D]; hidden width `hidden`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        out_scale: float = 1.0,
        activation: str = "silu",
        bias: bool = False,
    ):
        self.activation = activation
        self.gate = projection(dim, hidden, ("embed", "mlp"), rngs=rngs, bias=bias)
        self.up = projection(dim, hidden, ("embed", "mlp"), rngs=rngs, bias=bias)
        self.down = projection(hidden, dim, ("mlp", "embed"), rngs=rngs, scale=out_scale, bias=bias)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.activation](self.gate(x_BTD)) * self.up(x_BTD))


class PlainMLP(nnx.Module):
    """act(x W_up) W_down. Shapes [B, T, D] -> [B, T, D]; hidden width `hidden`."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        out_scale: float = 1.0,
        activation: str = "gelu_tanh",
        bias: bool = False,
    ):
        self.activation = activation
        self.up = projection(dim, hidden, ("embed", "mlp"), rngs=rngs, bias=bias)
        self.down = projection(hidden, dim, ("mlp", "embed"), rngs=rngs, scale=out_scale, bias=bias)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(ACTIVATIONS[self.activation](self.up(x_BTD)))


MLPS = {"gated": GatedMLP, "plain": PlainMLP}
