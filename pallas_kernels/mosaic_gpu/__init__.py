"""Parts of Mosaic GPU kernels (sm_90) shared by several operations."""
