"""Set classifiers: a bag of instances to class scores, by one of four poolings (multiple-instance learning).

    h_i = gelu(x_i W_in),   logits = W_head z + b,   z =
      hopfield          HopfieldPooling of the h_i (arXiv 2008.02217)
      mean, max         of h_i W over i
      gated_attention   sum_i a_i h_i W,  a = softmax_i(w . (tanh(h_i V) * sigmoid(h_i U)))  (arXiv 1802.04712)

Bags are not token rows and have no memory, so a set classifier is not a language model. Its contract is
`logits = model(bags, mask=None)`, and it is not in MODELS.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from engrax.errors import UserError
from engrax.layers import AssociationConfig, HopfieldPooling
from engrax.layers.common.modules import projection

POOLINGS = ("hopfield", "mean", "max", "gated_attention")


@dataclasses.dataclass(frozen=True)
class SetClassifierConfig:
    """Settings of a set classifier."""

    features: int = 8  # of an instance
    classes: int = 2
    hidden: int = 32  # width of an embedded instance
    pooling: Literal["hopfield", "mean", "max", "gated_attention"] = "hopfield"
    width: int = 32  # of gated attention's V and U, and of W under mean and max
    hopfield: AssociationConfig = AssociationConfig(heads=4, head_dim=8)  # of the pooling "hopfield"
    queries: int = 1  # learned query states of the pooling "hopfield"

    def __post_init__(self):
        if self.pooling not in POOLINGS:
            raise UserError(f"unknown pooling={self.pooling!r} (known: {', '.join(POOLINGS)}).")

    def build(self, *, rngs: nnx.Rngs) -> "SetClassifier":
        """Returns the module with freshly initialised parameters."""
        return SetClassifier(self, rngs=rngs)


class SetClassifier(nnx.Module):
    """bags [B, M, F] -> logits [B, C], independent of the order of instances."""

    def __init__(self, config: SetClassifierConfig, *, rngs: nnx.Rngs):
        self.config = c = config
        self.embed = projection(c.features, c.hidden, ("features", "embed"), rngs=rngs, bias=True)
        pooled = c.hidden
        if c.pooling == "hopfield":
            self.pool = HopfieldPooling(c.hopfield, c.hidden, queries=c.queries, rngs=rngs)
            pooled *= c.queries
        elif c.pooling == "gated_attention":
            self.tanh, self.sigmoid = (projection(c.hidden, c.width, ("embed", "heads"), rngs=rngs) for _ in range(2))
            self.score = projection(c.width, 1, ("heads", "score"), rngs=rngs)
            self.value = projection(c.hidden, c.hidden, ("embed", "embed"), rngs=rngs)
        else:
            self.value = projection(c.hidden, c.width, ("embed", "embed"), rngs=rngs, bias=True)
            pooled = c.width
        self.head = projection(pooled, c.classes, ("embed", "classes"), rngs=rngs, bias=True)

    def __call__(self, bags_BMF: Float[Array, "B M F"], mask: Bool[Array, "B M"] | None = None) -> Float[Array, "B C"]:
        """Class scores; mask: True = an instance of the bag. Every bag needs at least one."""
        return self.head(self.pooled(bags_BMF, mask))

    def pooled(self, bags_BMF, mask=None) -> Float[Array, "B E"]:
        """The vector that represents a bag."""
        h = jax.nn.gelu(self.embed(bags_BMF))
        mask = jnp.ones(h.shape[:2], bool) if mask is None else mask
        if self.config.pooling == "hopfield":
            return self.pool(h, mask=mask).reshape(len(h), -1)
        shown = mask[..., None]
        if self.config.pooling == "gated_attention":
            score = self.score(jnp.tanh(self.tanh(h)) * jax.nn.sigmoid(self.sigmoid(h)))
            weights = jax.nn.softmax(jnp.where(shown, score, -jnp.inf), axis=1)
            return jnp.sum(weights * jnp.where(shown, self.value(h), 0), axis=1)
        values = self.value(h)
        if self.config.pooling == "max":
            return jnp.max(jnp.where(shown, values, -jnp.inf), axis=1)
        return jnp.sum(jnp.where(shown, values, 0), axis=1) / jnp.sum(mask, axis=1, keepdims=True)
