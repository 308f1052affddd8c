"""Neural memory of Titans (arXiv:2501.00663): an MLP trained by gradient descent on the tokens that pass.

Files: `api` validates and chooses; `types` the state and the axis letters; `reference` the token-by-token oracle;
`grid` lays tokens out in chunks; `gates` turns gates into the coefficients of the dual form; `xla` and `vjp` its
forward and backward pass; `tpu` the same scan as kernels; `cost` counts FLOPs and bytes.
"""

IMPLEMENTATIONS = ("reference", "xla")
MISSING = {
    "pallas_gpu": "the Mosaic GPU kernel is not part of this version",
    "pallas_tpu": "the Mosaic TPU kernel's gradients are not yet as accurate as the XLA form's",
}
