"""Handwritten digits that come with scikit-learn (1797 images of 8 x 8; UCI "Optical Recognition of Handwritten
Digits"): real data without a download."""

import numpy as np
from jaxtyping import Float32, Int64

from engrax.data.config import require


def load_digits() -> tuple[Float32[np.ndarray, "N 64"], Int64[np.ndarray, " N"]]:
    """Returns flattened images with values in [0, 1], and their digits.

    Raises UserError if scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        datasets = None
    require(datasets is not None, "the digits come with scikit-learn: pip install scikit-learn.")
    found = datasets.load_digits()
    return (found.data / 16).astype(np.float32), found.target.astype(np.int64)
