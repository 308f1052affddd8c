"""Parts of Mosaic TPU kernels that several operations use."""
