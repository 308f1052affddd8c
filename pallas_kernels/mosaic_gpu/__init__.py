"""Parts of Mosaic GPU kernels (sm_90) that several operations use."""
