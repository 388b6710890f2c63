"""Estimate a run's memory, part by part: where it fits, and what would make it fit. No model is loaded."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("estimate_memory")
