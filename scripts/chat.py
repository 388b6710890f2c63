"""Talk to a run's exported model."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("chat")
