"""Conversations to token ids: roles, chat templates, tokenizers."""

from tune2gguf.tokenizer.tokenizer import load_tokenizer

__all__ = ["load_tokenizer"]
