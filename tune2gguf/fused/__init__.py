"""A Llama layer's training step in few CUDA kernels: `kernels` in Triton, `launch` for each, `layer` of all of them."""
