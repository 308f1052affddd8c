"""Other implementations that `engrax bench` times beside ours if their packages and a CUDA device are available.

    fla        flash-linear-attention 0.6 (Triton, PyTorch): `chunk_*` of `fla.ops`
    jla        jax-linear-attention 0.1 (Mosaic GPU, Hopper): its kernels by name, so that it does not fall back either
    cudnn      causal softmax attention by cuDNN on the same q, k and v: a yardstick, another function than ours
    attention  the same by XLA, on a CPU

The peers get the same arrays as ours. Their packages are optional and are imported when called.
"""

import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import jax
import numpy as np

FLA, JLA, CUDNN, ATTENTION = "fla", "jla", "cudnn", "attention"
PEERS = (FLA, JLA, CUDNN, ATTENTION)
YARDSTICKS = (CUDNN, ATTENTION)  # a different function: no error, no roofline
MODULES = {FLA: ("torch", "triton", "fla.ops"), JLA: ("jla.ops",)}
INSTALL = {FLA: "fla-core==0.6.0, with PyTorch and Triton", JLA: "jax-linear-attention==0.1.0"}

# The peers' names for an operation with this gate.
FLA_KINDS = {
    ("linear_attention", "scalar"): "simple_gla",
    ("linear_attention", "channel"): "gla",
    ("gated_delta_rule", "none"): "delta_rule",
    ("gated_delta_rule", "scalar"): "gated_delta_rule",
    ("gated_delta_rule", "channel"): "kda",
}
JLA_KINDS = FLA_KINDS | {
    ("gated_delta_rule", "none"): "deltanet",
    ("gated_delta_rule", "scalar"): "gated_deltanet",
}


class Times(NamedTuple):
    """Milliseconds of every run: wall clock of a blocking call, and time between CUDA events around it."""

    wall: list[float]
    device: list[float]
    temporary_mb: float


def serves(name: str, op: str, sizes: dict[str, Any]) -> bool:
    """Whether the peer can be timed at this shape; a yardstick is timed once for all gates of a shape."""
    gate = sizes.get("gate")
    return (op, gate) in FLA_KINDS and (name not in YARDSTICKS or gate == "scalar")


def missing(name: str) -> str | None:
    """Returns why the peer is left out here, or None if it runs."""
    if name == ATTENTION:
        return None if jax.default_backend() == "cpu" else "it is timed on a CPU: elsewhere its T x T scores do not fit"
    if not _cuda_here():
        return "it needs a CUDA device, none is here"
    for module in MODULES.get(name, ()):
        try:
            import_module(module)
        except ImportError as error:
            return f"it needs {INSTALL[name]}: {error}"
    if name == FLA and not import_module("torch").cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None


def forward_only(name: str, op: str, sizes: dict[str, Any]) -> str | None:
    """Returns why the peer's gradients are not timed here, or None if they are."""
    if name != FLA or import_module("torch").cuda.get_device_capability()[0] != 9:
        return None
    kind = FLA_KINDS[op, sizes["gate"]]
    if kind == "delta_rule":
        return "its dk and dbeta are suspect on Hopper (flash-linear-attention issue 984)"
    version = tuple(int(part) for part in import_module("triton").__version__.split("+")[0].split(".")[:3])
    if kind in ("simple_gla", "gated_delta_rule") and (3, 4, 0) <= version < (3, 7, 1) and not _has("tilelang"):
        return "it refuses gradients with a gate per head on Hopper with Triton 3.4.0 to 3.7.0 (its issue 640)"
    return None


def call(name: str, op: str, sizes: dict[str, Any], arrays: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
    """Returns (out, final state) of a peer run by JAX; a yardstick has no state."""
    scale = sizes["key"] ** -0.5
    if name in YARDSTICKS:
        implementation = "cudnn" if name == CUDNN else "xla"
        q_k_v = (arrays[name] for name in "qkv")
        return jax.nn.dot_product_attention(*q_k_v, scale=scale, is_causal=True, implementation=implementation), ()
    kind = JLA_KINDS[op, sizes["gate"]]
    options = dict(impl="mosaic_gpu", scale=scale, output_final_state=True)
    return import_module("jla.ops").linear_attention(kind, **arrays, **options)


def torch_programs(
    op: str, sizes: dict[str, Any], arrays: dict[str, jax.Array]
) -> tuple[Callable[[], tuple], Callable[[], tuple]]:
    """Returns two flash-linear-attention functions on copies of the arrays. The first gives (out, final state). The
    second gives the gradients of the sum of their sines, in the order of the arrays.
    """
    torch, kind = import_module("torch"), FLA_KINDS[op, sizes["gate"]]
    function = getattr(import_module(f"fla.ops.{kind}"), f"chunk_{kind}")
    jax.block_until_ready(arrays)
    tensors = {name: torch.from_dlpack(x).clone().requires_grad_() for name, x in arrays.items()}

    def run():
        return function(**tensors, scale=sizes["key"] ** -0.5, output_final_state=True)

    def forward():
        with torch.no_grad():
            return run()

    def gradients():
        out, state = run()
        total = out.float().sin().sum() + state.float().sin().sum()
        return torch.autograd.grad(total, list(tensors.values()))

    return forward, gradients


def torch_times(program: Callable[[], Any], runs: int) -> Times:
    """Times a PyTorch program after two warm-up runs, in which Triton compiles and tunes."""
    torch = import_module("torch")
    for _ in range(2):
        program()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, wall, device = torch.cuda.memory_allocated(), [], []
    for _ in range(runs):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin = time.perf_counter()
        before.record()
        program()
        after.record()
        torch.cuda.synchronize()
        wall.append((time.perf_counter() - begin) * 1e3)
        device.append(before.elapsed_time(after))
    return Times(wall, device, (torch.cuda.max_memory_allocated() - held) / 2**20)


def to_numpy(tensors: tuple) -> Iterator[np.ndarray]:
    """Copies PyTorch tensors to NumPy, bfloat16 as float32, since NumPy lacks bfloat16."""
    return (x.detach().float().cpu().numpy() for x in tensors)


def _cuda_here() -> bool:
    try:
        return bool(jax.local_devices(backend="cuda"))
    except RuntimeError:  # this process lacks the backend
        return False


def _has(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True
