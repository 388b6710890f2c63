"""Compare runs: a table of what differs, validation loss, time, memory and verdict, and a page with the curves."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("compare_runs")
