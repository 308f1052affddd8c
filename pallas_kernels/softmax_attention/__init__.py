"""Softmax attention within rows: causal, optionally in a window, within segments, with grouped heads.

Files: `api` validates and chooses; `reference` has all scores in memory; `xla` works in blocks; `cudnn` and `splash`
call the libraries' kernels; `cost` counts FLOPs and bytes.
"""

from engrax.pallas_kernels.dispatch import Implementation, Later, everywhere, kernel

CUDNN = f"{__name__}.cudnn"
INSTALLED = Later(CUDNN, "not_installed")
IMPLEMENTATIONS = (
    Implementation("cudnn_attention", "cuda", None, Later(CUDNN, "unsupported"), Later(CUDNN, "passes"), INSTALLED),
    Implementation(
        "cudnn_or_xla", "cuda", None, Later(CUDNN, "unsupported_by_rows"), Later(CUDNN, "passes_by_rows"), INSTALLED
    ),
    kernel("splash_attention", "tpu", None, f"{__name__}.splash"),
    everywhere("xla", f"{__name__}.xla"),
    everywhere("reference", f"{__name__}.reference", "softmax_attention_reference"),
)
MISSING: dict[str, str] = {}
