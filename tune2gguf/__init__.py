"""LoRA fine-tuning of Llama models with torchtune, from training rows to a GGUF that Ollama loads."""
