"""The content of a GGUF file: metadata, tensors, vocabulary, quantization types and kernels."""
