"""The program `tune2gguf`, which the files in scripts/ call too. Each command is a module with a main()."""

from __future__ import annotations

import sys
from importlib import import_module

from tune2gguf.commands import SUBCOMMANDS
from tune2gguf.files.output import run_program

_HELP = {
    "ls": "list the configs that come with the package",
    "cp": "copy a config, or another file of `tune2gguf ls`, to change it",
    "download": "get the base model that a config names",
    "inspect": "look at data before training: rows, tokens, and which tokens are supervised",
    "estimate": "estimate how much memory a run needs, and where it fits",
    "run": "train, on a CPU, one GPU or several: what `tune run recipes/lora_finetune.py` does",
    "sweep": "run a config with each combination of values, and rank the runs",
    "report": "write a run's report.html again, and print its verdict and the next command",
    "compare": "compare runs in a table and a page",
    "remind": "write rows of general answers to mix in, against forgetting",
    "export": "write a run's GGUF and Modelfile, and prove them",
    "show": "show a run's validation loss and answers, before and after",
    "chat": "talk to a run's exported model",
}
assert _HELP.keys() == SUBCOMMANDS.keys()


def main() -> None:
    """Run `tune2gguf COMMAND …`; each command has its own --help."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(_describe())
    elif name == "--version":
        from importlib.metadata import version

        print(version("tune2gguf"))
    elif name not in SUBCOMMANDS:
        sys.exit(f"error: unknown command {name!r}; known are {', '.join(SUBCOMMANDS)}")
    else:
        sys.argv = [f"tune2gguf {name}", *rest]
        run_command(SUBCOMMANDS[name])


def run_command(module: str) -> None:
    """Run a command as this process's program, with the arguments in sys.argv."""
    with run_program():
        import_module(f"tune2gguf.cli.{module}").main()


def _describe() -> str:
    lines = [f"  {name:<10} {text}" for name, text in _HELP.items()]
    return "\n".join(["usage: tune2gguf COMMAND …", "", *lines, "", "For details: tune2gguf COMMAND --help"])
