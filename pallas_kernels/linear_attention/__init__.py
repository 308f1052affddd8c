"""Linear attention with decay: S_t = exp(g_t) S_{t-1} + k_t v_t^T, out_t = scale q_t S_t.

Members of the family: no gate (linear attention), one gate per head (RetNet, Mamba-2), one per channel (GLA, HGRN2).

Files: `api` validates and chooses; `reference` is the token-by-token oracle; `chunk` has one chunk of one head; `vjp`
says what is saved and what is recomputed; `xla` runs many chunks at once; `cost` counts FLOPs and bytes.
"""

from engrax.pallas_kernels.dispatch import everywhere, kernel

IMPLEMENTATIONS = (
    kernel("pallas_gpu", "cuda", ("sm_90",), f"{__name__}.gpu"),
    kernel("pallas_tpu", "tpu", None, f"{__name__}.tpu"),
    everywhere("xla", f"{__name__}.xla"),
    everywhere("reference", f"{__name__}.reference", "linear_attention_reference"),
)
MISSING: dict[str, str] = {}
