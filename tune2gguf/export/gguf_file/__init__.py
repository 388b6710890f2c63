"""The content of a GGUF file: metadata, tensors, vocabulary, importance matrix."""
