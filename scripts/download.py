"""Get the base model that a config names."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("download")
