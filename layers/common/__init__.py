"""Shared parts of mixers: projections, norms, gates, convolutions, segments, adapters, the matrix-memory base."""
