"""Exported models at work: llama.cpp in process, chat, proof, before and after, Ollama."""
