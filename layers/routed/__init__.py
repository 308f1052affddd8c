"""Mixtures of memories and the associative memory of ARMT."""
