"""Base models on disk: sources, downloads, checkpoints, loading."""
