"""Gated delta rule: S_t = exp(g_t) S_{t-1}, then S_t += beta_t k_t (v_t - S_t^T k_t)^T, out_t = scale q_t S_t.

Members of the family: no gate (DeltaNet), one gate per head (Gated DeltaNet), one per channel (KDA).

Files: `api` validates and chooses; `reference` is the token-by-token oracle; `chunk` has one chunk of one head, and
`inverse` its triangular system; `vjp` says what is saved and what is recomputed; `xla` runs many chunks at once; `cost`
counts FLOPs and bytes.
"""

from engrax.pallas_kernels.dispatch import everywhere, kernel

IMPLEMENTATIONS = (
    kernel("pallas_gpu", "cuda", ("sm_90",), f"{__name__}.gpu"),
    kernel("pallas_tpu", "tpu", None, f"{__name__}.tpu"),
    everywhere("xla", f"{__name__}.xla"),
    everywhere("reference", f"{__name__}.reference", "gated_delta_rule_reference"),
)
MISSING: dict[str, str] = {}
