"""Matrix memories written by the delta rule: DeltaNet, Gated DeltaNet, KDA."""
