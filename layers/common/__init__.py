"""What mixers share: projections, norms, gates, convolutions, segments, adapters, the matrix-memory base."""
