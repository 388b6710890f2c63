"""Answer general prompts with a run's base, as rows to mix in: python scripts/make_general_rows.py runs/NAME"""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("make_general_rows")
