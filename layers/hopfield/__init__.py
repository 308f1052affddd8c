"""Modern Hopfield layers: association, fixed stored patterns, pooling, the causal mixer, the energy transformer."""
