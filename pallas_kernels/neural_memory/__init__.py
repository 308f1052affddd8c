"""Neural memory of Titans (arXiv:2501.00663): an MLP trained by gradient descent on the incoming tokens.

Files: `api` validates and chooses; `types` has the state and the axis letters; `reference` is the token-by-token
oracle; `grid` lays tokens out in chunks; `gates` turns gates into the coefficients of the dual form; `xla` and `vjp`
are its forward and backward pass; `gpu` and `tpu` run the same scan as kernels; `cost` counts FLOPs and bytes.
"""

from engrax.pallas_kernels.dispatch import everywhere, kernel

IMPLEMENTATIONS = (
    kernel("pallas_gpu", "cuda", ("sm_90",), f"{__name__}.gpu"),
    kernel("pallas_tpu", "tpu", None, f"{__name__}.tpu"),
    everywhere("xla", f"{__name__}.xla"),
    everywhere("reference", f"{__name__}.reference", "neural_memory_reference"),
)
MISSING: dict[str, str] = {}
