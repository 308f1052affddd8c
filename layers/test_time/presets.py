"""Published test-time memories as settings of the general one, each registered under its name.

If a paper leaves a choice open, or differs from its published code, the docstring states the choice made here.
"""

import dataclasses

from engrax.layers.mixer import MIXERS
from engrax.layers.test_time.mixer import MemoryConfig


def _small(cls, **changes):
    """A small setting of a preset with persistent tokens and the convolution on, for the laws."""
    return dataclasses.replace(cls(heads=2, head_dim=4, hidden=6, chunk_size=8, persistent_tokens=3), **changes)


class _Preset(MemoryConfig):
    @classmethod
    def examples(cls):
        return (_small(cls),)


@MIXERS.register("ttt_linear")
@dataclasses.dataclass(frozen=True)
class TTTLinearConfig(_Preset):
    """TTT-Linear (arXiv 2407.04620): f(x) = x + LN(x W + b), loss 1/2 |f(k) - v|^2 = 1/2 |LN(k W + b) - (v - k)|^2.

    Plain gradient descent without momentum or forgetting, gradients at the mini-batch's start, read after the write.
    """

    structure: str = "residual_mlp"
    depth: int = 1
    bias: bool = True
    normed: bool = True
    forgetting: str = "none"
    optimizer: str = "sgd"


@MIXERS.register("ttt_mlp")
@dataclasses.dataclass(frozen=True)
class TTTMLPConfig(TTTLinearConfig):
    """TTT-MLP (arXiv 2407.04620): TTT-Linear with f(x) = x + LN(gelu(x W_1 + b_1) W_2 + b_2).

    The paper's hidden width is four times that of the head: set `hidden` accordingly.
    """

    depth: int = 2
    hidden: int = 128


@MIXERS.register("lact")
@dataclasses.dataclass(frozen=True)
class LaCTConfig(_Preset):
    """LaCT (arXiv 2505.23884): a SwiGLU memory, loss -<f(k), v>, large chunks that are read before they are written.

    At the end of a chunk W <- row_norm(W + NS(S)); row_norm restores the norm of the weights of every output. The
    paper's chunk is 2048 tokens and its step is Muon's. Here the step is scaled by the chunk's mean learning rate, so a
    rate of 0 writes nothing, and momentum is per token, not per chunk.
    """

    structure: str = "swiglu"
    loss: str = "dot"
    retention: str = "row_norm"
    forgetting: str = "none"
    optimizer: str = "muon"
    order: str = "read_then_write"
    chunk_size: int = 64
    max_lr: float | None = 1.0


@MIXERS.register("yaad")
@dataclasses.dataclass(frozen=True)
class YaadConfig(_Preset):
    """Yaad (arXiv 2504.13173): Titans without momentum, with the Huber loss: large errors count linearly.

    Its threshold is per token; the loss is taken coordinate by coordinate.
    """

    loss: str = "huber"
    optimizer: str = "sgd"


@MIXERS.register("moneta")
@dataclasses.dataclass(frozen=True)
class MonetaConfig(_Preset):
    """Moneta (arXiv 2504.13173): loss 1/p |M(k) - v|_p^p and W = A / |A|_q^(q-2), (p, q) = (3, 4); no momentum.

    A takes the steps and forgets; the normalisation acts at the ends of chunks.
    """

    loss: str = "lp"
    loss_power: float = 3.0
    retention: str = "q_norm"
    norm_power: float = 4.0
    optimizer: str = "sgd"


@MIXERS.register("memora")
@dataclasses.dataclass(frozen=True)
class MemoraConfig(_Preset):
    """Memora (arXiv 2504.13173): W <- softmax((1 - forget) log W - lr grad): KL retention on the simplex; no momentum.

    The simplex is that of the weights into every output; the update acts at the ends of chunks. Weights move by
    multiplication, so the learning rate is larger than elsewhere. The paper's constant c before the softmax is 1.
    """

    retention: str = "softmax"
    optimizer: str = "sgd"
    max_lr: float | None = 1.0


@MIXERS.register("omeganet")
@dataclasses.dataclass(frozen=True)
class OmegaNetConfig(_Preset):
    """OmegaNet (arXiv 2505.23735): every step uses the last c tokens with individual weights; keys and queries have
    polynomial features; no momentum.

    The paper's memory is x + W_1 gelu(W_2 x). With features its input is wider than its output, so the residual is
    omitted here.
    """

    optimizer: str = "sgd"
    window: int = 8
    feature_degree: int = 2

    @classmethod
    def examples(cls):
        return (_small(cls, window=3),)


@MIXERS.register("atlas")
@dataclasses.dataclass(frozen=True)
class AtlasConfig(OmegaNetConfig):
    """ATLAS (arXiv 2505.23735): OmegaNet with momentum and Newton-Schulz steps (Muon).

    The paper orthogonalises the momentum of every token. Here, like every nonlinear update, it happens at the ends of
    chunks, with the chunk's mean learning rate times NS(S) as the step.
    """

    optimizer: str = "muon"
    max_lr: float | None = 1.0
