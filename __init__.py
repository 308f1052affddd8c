"""engrax: memory-augmented sequence architectures in JAX/Flax, tested by the same laws."""

__version__ = "0.1.0"
