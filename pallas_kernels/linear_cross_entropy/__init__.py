"""Cross entropy of a linear head: loss_t = logsumexp_v (h_t . e_v) - h_t . e_label, without the logits in memory.

Files: `api` validates and chooses; `reference` computes all logits; `xla` processes the vocabulary in tiles, with its
own backward pass; `cost` counts FLOPs and bytes.
"""

from engrax.pallas_kernels.dispatch import everywhere

IMPLEMENTATIONS = (
    everywhere("xla", f"{__name__}.xla", "linear_cross_entropy_xla"),
    everywhere("reference", f"{__name__}.reference", "linear_cross_entropy_reference"),
)
MISSING = {
    "pallas_gpu": "there is no kernel: matrix products bind this operation, and XLA's are as fast",
    "pallas_tpu": "there is no kernel: matrix products bind this operation, and XLA's are as fast",
}
