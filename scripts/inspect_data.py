"""Look at data before training: rows, tokens, and which tokens are supervised."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("inspect_data")
