"""The evaluators, one file each: every file here registers itself, and `engrax evaluate` finds it."""
