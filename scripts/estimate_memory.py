"""Say how much memory a run will need, part by part, where it fits, and what would make it fit. Nothing is loaded."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("estimate_memory")
