"""Parts of Mosaic TPU kernels shared by several operations."""
