"""Weights on disk: base checkpoints in, the adapter and the state of a run in and out."""
