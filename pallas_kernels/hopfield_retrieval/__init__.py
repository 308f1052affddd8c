"""Retrieval from a modern Hopfield network (arXiv 2008.02217): xi <- X^T sep(beta sim(X, xi)), once or until it rests.

Files: `api` validates and chooses; `separation` turns scores into weights; `similarity` makes the scores; `reference`
iterates as the definition says and solves dense systems for implicit gradients; `xla` has the bounded loop and both
backward passes; `gpu` and `tpu` keep the patterns on chip; `energy` is what the updates descend; `cost` counts
FLOPs and bytes.
"""

IMPLEMENTATIONS = ("reference", "xla", "pallas_gpu", "pallas_tpu")
MISSING: dict[str, str] = {}
