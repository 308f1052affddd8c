"""What operations share: validation, canonical shapes, segments, decays, matrix products, costs, partitioning."""
