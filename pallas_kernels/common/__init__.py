"""Shared parts of operations: validation, canonical shapes, segments, decays, matrix products, costs, partitioning."""
