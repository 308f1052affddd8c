"""Timing of the operations, alone and against their baselines: `engrax bench`."""
