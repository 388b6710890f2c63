"""Write report.html of a run again, from what its folder holds, and say the verdict and the next command."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("report")
