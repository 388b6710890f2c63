"""Export a run: merge its adapter into the base, write GGUF, Modelfile and model card to the run's export folder."""

from tune2gguf.cli import run_command

if __name__ == "__main__":
    run_command("export")
