"""Short depthwise causal convolution with an explicit tail, which continues at any position."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.layers.common import sequence
from engrax.layers.common.segments import first_segment_of_row, newest
from engrax.pallas_kernels.common.segments import row_lengths


class ShortConv(nnx.Module):
    """y_t = sum_{j<W} w_j * x_{t-j} (+ b), per channel (Titans section 4.4; width 4 in the field's models).

    It never mixes segments: a tap in another segment, in padding, or before the row's start reads 0.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        bias: bool = False,
        widths: tuple[int, ...] | None = None,
    ):
        """widths: channels of the projections that lie side by side, as queries, keys and values; None = one."""
        # All taps start equal, so combining a token with the previous one needs no tap to grow first.
        kernel = jax.random.normal(rngs.params(), (width, channels)) * width**-0.5
        self.kernel = nnx.Param(kernel, axes=("conv", "channels"), role="convolution", widths=widths or (channels,))
        self.width = width
        if bias:
            self.bias = nnx.Param(jnp.zeros(channels), axes=("channels",), role="bias", widths=widths or (channels,))

    def init_tail(self, batch_size: int, dtype) -> Float[Array, "B tail C"]:
        """The W - 1 inputs before the row: zeros. The newest is last."""
        return jnp.zeros((batch_size, self.width - 1, self.kernel.shape[-1]), dtype)

    def __call__(
        self,
        x_BTC: Float[Array, "B T C"],
        tail_BWC: Float[Array, "B tail C"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B tail C"]]:
        """Returns the convolved tokens and the new tail.

        The given tail must belong to the segment of the row's first token (zeros for a new segment). The new tail holds
        the last W - 1 inputs before the padding at the row's end, zero for inputs of other segments. Of a row split
        over devices, both tails are the whole row's.
        """
        W, T = self.width, x_BTC.shape[1]
        kernel_WC = self.kernel[...]
        if segment_ids is not None:
            x_BTC = jnp.where((segment_ids >= 0)[..., None], x_BTC, 0)
        before = tail_BWC.astype(x_BTC.dtype)
        if sequence.is_split() and W > 1:
            sequence.least_length(T, W - 1, f"a convolution of {W} taps")
            before = sequence.before(x_BTC[:, T - W + 1 :], before)
        padded = jnp.concatenate([before, x_BTC], axis=1)
        y_BTC = kernel_WC[0] * x_BTC
        ids = None
        if segment_ids is not None:
            first = jnp.broadcast_to(first_segment_of_row(segment_ids)[:, None], (segment_ids.shape[0], W - 1))
            if sequence.is_split() and W > 1:
                first = sequence.before(segment_ids[:, T - W + 1 :], first)
            ids = jnp.concatenate([first, segment_ids], axis=1)
        for j in range(1, W):
            past = jax.lax.slice_in_dim(padded, W - 1 - j, W - 1 - j + T, axis=1)
            if ids is not None:
                past = jnp.where(
                    (jax.lax.slice_in_dim(ids, W - 1 - j, W - 1 - j + T, axis=1) == segment_ids)[..., None], past, 0
                )
            y_BTC = y_BTC + kernel_WC[j] * past
        if hasattr(self, "bias"):
            y_BTC = y_BTC + self.bias[...].astype(y_BTC.dtype)
        lengths = None if segment_ids is None else row_lengths(segment_ids)
        tail = newest(padded, W - 1, lengths)
        if ids is not None:
            tail_ids = newest(ids, W - 1, lengths)
            last = jnp.max(ids, axis=1, keepdims=True)
            tail = jnp.where((tail_ids == last)[..., None], tail, 0)
        if sequence.is_split():
            held = jnp.ones(len(x_BTC), bool) if lengths is None else lengths > 0
            tail = sequence.of_last(tail, held)
        return y_BTC, tail.astype(tail_BWC.dtype)
