"""Softmax attention and its caches: full, sliding window, Transformer-XL, Memorizing Transformer."""
