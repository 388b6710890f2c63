"""What only a CUDA device can show; `python -m pytest -m gpu tests/gpu` runs it."""
