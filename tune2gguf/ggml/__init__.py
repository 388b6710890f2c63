"""ggml: the types that a GGUF's tensors have, which tensor gets which, and the kernels that quantize."""
