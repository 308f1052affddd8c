"""Neural memory of Titans (arXiv:2501.00663): an MLP trained by gradient descent on the tokens that pass.

Files: `api` validates and chooses; `types` the state and the axis letters; `reference` the token-by-token oracle;
`grid` lays tokens out in chunks; `gates` turns gates into the coefficients of the dual form; `xla` and `vjp` its
forward and backward pass; `gpu` and `tpu` the same scan as kernels; `cost` counts FLOPs and bytes.
"""

IMPLEMENTATIONS = ("reference", "xla", "pallas_gpu", "pallas_tpu")
MISSING: dict[str, str] = {}
