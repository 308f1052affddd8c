"""Products of blocks of rows with one of several kernels each: y_m = x_m W_owner(m). A mixture's projections.

Files: `api` validates and chooses; `grouping` puts the blocks of an owner side by side; `reference` copies the kernel
of every block; `xla` loops over blocks on CPU and multiplies tiles in one batched product elsewhere; `gpu` and `tpu`
call the grouped kernels that jax ships; `cost` counts FLOPs and bytes.

`jax.lax.ragged_dot` is not used (compiled with jax 0.12 for a mixture of 5 memories). For an H200 it multiplies every
row with all kernels. For TPU v5e it multiplies 1.25 times the columns, in tiles that do not divide them.
"""

from engrax.pallas_kernels.dispatch import everywhere, kernel

IMPLEMENTATIONS = (
    kernel("pallas_gpu", "cuda", ("sm_90",), f"{__name__}.gpu"),
    kernel("pallas_tpu", "tpu", None, f"{__name__}.tpu"),
    everywhere("xla", f"{__name__}.xla"),
    everywhere("reference", f"{__name__}.reference", "grouped_matmul_reference"),
)
MISSING: dict[str, str] = {}
