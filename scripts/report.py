"""Write a run's report.html again from its folder, and print the verdict and the next command."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("report")
