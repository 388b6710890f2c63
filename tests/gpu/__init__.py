"""Tests that need a CUDA device; run them with `python -m pytest -m gpu tests/gpu`."""
