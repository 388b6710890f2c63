"""Commands: their names, the files they take, overrides as typed, and commands as printed, quoted for the shell."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Name in `tune2gguf COMMAND` -> name of its module in tune2gguf/cli/ and of its file in scripts/.
SUBCOMMANDS = {
    "ls": "ls",
    "cp": "cp",
    "download": "download",
    "inspect": "inspect_data",
    "estimate": "estimate_memory",
    "run": "run",
    "sweep": "sweep",
    "report": "report",
    "compare": "compare_runs",
    "remind": "make_general_rows",
    "export": "export",
    "show": "show_result",
    "chat": "chat",
}
RECIPE = "recipes/lora_finetune.py"
_ROOT = Path(__file__).parent
_SHIPPED = (RECIPE, "configs/*/*.yaml", "examples/quickstart/*.yaml", "examples/quickstart/*.jsonl")

# Keys that hold a path, or a list of them.
PATH_KEYS = (
    "output_dir",
    "base_dir",
    "parent_run",
    "resume",
    "model.base_dir",
    "tokenizer.base_dir",
    "dataset.files",
    "dataset.validation_files",
    "metric_logger.log_dir",
)
# Keys that hold text or null.
TEXT_KEYS = ("dataset.prompt",)
# Keys that map names to names.
MAPPING_KEYS = ("dataset.columns",)
# Keys that hold a text or a list of texts.
TEXTS_KEYS = ("dataset.files", "dataset.validation_files")


def expand_path(text: str) -> Path:
    """Return a typed path with ~ expanded, which shells do not do in --key=~/x and key=~/x."""
    return Path(os.path.expanduser(text))


def find_shipped(name: str) -> Path:
    """Return the path of a file that comes with the package: in a wheel's tune2gguf/shipped, or in the checkout."""
    inside = _ROOT / "shipped"
    return (inside if inside.is_dir() else _ROOT.parent) / name


def list_shipped() -> list[Path]:
    """Return the files that come with the package, as names for find_shipped and `tune2gguf cp`."""
    root = find_shipped("")
    return [path.relative_to(root) for pattern in _SHIPPED for path in sorted(root.glob(pattern))]


def find_config(text: str) -> Path:
    """Return the path of a typed config; if there is no such file, it may name a config of the package."""
    path = expand_path(text)
    return find_shipped(text) if not path.exists() and Path(text) in list_shipped() else path


def read_override(text: str, *, is_text: bool) -> Any:
    """Return the value typed after `key=`, read as YAML, except that unquoted text stays as it is typed.

    YAML alone would cut `exp #2` at the #, and would not read `2024`, `yes` and `a: b` as text.

    Args:
        is_text: whether the key holds text; null and an empty value are not text
    """
    try:
        value = _read_yaml(text)
    except ValueError:
        return text
    if isinstance(value, str):
        return value if _is_quoted(text) else text
    return text if is_text and (value is not None or text == "~") else value


def read_texts(text: str) -> Any:
    """Return the value typed for a key of TEXTS_KEYS: a list of texts in brackets, one text, or null."""
    if text.startswith("["):
        try:
            values = yaml.load(text, Loader=yaml.BaseLoader)  # reads every scalar as text
        except yaml.YAMLError:
            return text
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return values
    return read_override(text, is_text=True)


def _read_yaml(text: str) -> Any:
    """Return a value as OmegaConf reads it. Raises ValueError if it is not YAML."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(str(error)) from None


def _is_quoted(text: str) -> bool:
    if not text.startswith(("'", '"')):
        return False
    node = yaml.compose(text, Loader=yaml.BaseLoader)
    return node.style in ("'", '"') and node.end_mark.index == len(text)


def format_command(*words: object) -> str:
    """Return a command for the shell. A Path that would be read as an option or a home folder gets a leading ./"""
    return shlex.join(_protect(word) if isinstance(word, Path) else str(word) for word in words)


def format_script(name: str, *words: object) -> str:
    """Return the command of scripts/NAME.py if the working directory is the checkout, else that of tune2gguf."""
    if os.path.isfile(RECIPE):
        return format_command("python", f"scripts/{name}.py", *words)
    subcommand = next(subcommand for subcommand, module in SUBCOMMANDS.items() if module == name)
    return format_command("tune2gguf", subcommand, *words)


def format_run(*words: object, num_processes: int = 1) -> str:
    """Return the command of a run, through torchtune's `tune` if the working directory is the checkout."""
    processes = ["--nproc_per_node", str(num_processes)] if num_processes > 1 else []
    if os.path.isfile(RECIPE):
        return format_command("tune", "run", *processes, RECIPE, *words)
    return format_command("tune2gguf", "run", *processes, *words)


def format_overrides(overrides: Mapping[str, Any]) -> list[str]:
    """Return `key=value` words that read_config reads as these values; format_command quotes them."""
    values = {key: _protect_paths(value) if key in PATH_KEYS else value for key, value in overrides.items()}
    return [f"{key}={format_value(value)}" for key, value in values.items()]


def escape_references(text: str) -> str:
    """Escape ${ in a text, so OmegaConf resolves it to the text itself."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", text)


def _protect(path: str | Path) -> str:
    text = str(path)
    return f"./{text}" if text.startswith(("-", "~")) or text == "???" else text  # OmegaConf's "no value"


def _protect_paths(value: Any) -> Any:
    if isinstance(value, list):
        return [_protect(one) for one in value]
    return _protect(value) if isinstance(value, (str, Path)) else value


def format_value(value: Any) -> str:
    """Return a value as YAML that every parser reads alike: 2.0e-4, because some read 2e-4 as text."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_format_inner(key)}: {_format_inner(one)}' for key, one in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_format_inner, value))}]"
    if isinstance(value, (str, Path)):
        return _quote(str(value))
    if not isinstance(value, float) or value == 0 or 0.001 <= abs(value) < 1e16:
        return str(value)
    mantissa, exponent = f"{Decimal(repr(value)):e}".split("e")
    return f"{mantissa if '.' in mantissa else f'{mantissa}.0'}e{exponent}"


def _format_inner(value: Any) -> str:
    """Return a value within brackets or braces."""
    return _quote(str(value), in_list=True) if isinstance(value, (str, Path)) else format_value(value)


def _quote(text: str, *, in_list: bool = False) -> str:
    """Return text plain if YAML reads it unchanged, else in double quotes."""
    text = escape_references(text)
    try:
        is_plain = _read_yaml(f"[{text}]") == [text] if in_list else _read_yaml(text) == text
    except ValueError:
        is_plain = False
    if is_plain and text.isprintable() and not text.startswith(("'", '"', "[", "{")):
        return text
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=float("inf")).rstrip("\n")
