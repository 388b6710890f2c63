"""Run a config with each combination of values and rank the runs by validation loss."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("sweep")
