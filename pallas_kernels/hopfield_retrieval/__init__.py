"""Retrieval from a modern Hopfield network (arXiv 2008.02217): xi <- X^T sep(beta sim(X, xi)), once or to convergence.

Files: `api` validates and chooses; `visibility` says which patterns a state sees; `similarity` computes the scores;
`separation` turns scores into weights; `reference` iterates by the definition and solves dense systems for implicit
gradients; `xla` has the bounded loop and both backward passes; `gpu` and `tpu` keep the patterns on chip; `energy` has
the energy that updates descend; `cost` counts FLOPs and bytes.
"""

from engrax.pallas_kernels.dispatch import everywhere, kernel

IMPLEMENTATIONS = (
    kernel("pallas_gpu", "cuda", ("sm_90",), f"{__name__}.gpu"),
    kernel("pallas_tpu", "tpu", None, f"{__name__}.tpu"),
    everywhere("xla", f"{__name__}.xla"),
    everywhere("reference", f"{__name__}.reference", "hopfield_retrieval_reference"),
)
MISSING: dict[str, str] = {}
