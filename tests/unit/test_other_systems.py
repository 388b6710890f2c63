"""Other systems: imports and CPU runs need nothing that Windows and macOS lack."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tune2gguf.machine import devices

# Python on Windows lacks these modules and functions; other packages have their own substitutes.
HIDE = """
import builtins, os, sys
import psutil  # has a module for each system
whole_import = builtins.__import__
def import_(name, scope=None, *rest, **named):
    if name in ("fcntl", "resource", "termios", "pwd", "grp", "pty", "tty"):
        if str((scope or {}).get("__name__")).startswith(("tune2gguf", "recipes")):
            raise ModuleNotFoundError(f"No module named {name!r}")
    return whole_import(name, scope, *rest, **named)
builtins.__import__ = import_
for name in ("sysconf", "sched_getaffinity", "fork", "getpgid", "getloadavg"):
    delattr(os, name)
"""
IMPORT_ALL = """
import pkgutil
import tune2gguf
from importlib import import_module
for module in pkgutil.walk_packages(tune2gguf.__path__, "tune2gguf."):
    # Triton is for Linux alone.
    if not module.name.endswith("__main__") and ".fused." not in module.name:
        import_module(module.name)
print("imported")
"""
TRAIN = """
from recipes.lora_finetune import recipe_main
sys.argv[:] = ["lora_finetune.py", *{arguments!r}]
recipe_main()
"""


def run_hidden(program: str) -> str:
    command = [sys.executable, "-c", HIDE + program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_module_is_imported_without_what_only_posix_has():
    assert run_hidden(IMPORT_ALL).endswith("imported\n")


@pytest.mark.slow
def test_a_run_on_a_cpu_needs_nothing_that_only_posix_has(run_arguments):
    printed = run_hidden(TRAIN.format(arguments=[*run_arguments, "max_steps_per_epoch=1"]))
    assert "its GGUF: " in printed


def test_peak_and_free_memory_are_known_without_proc(monkeypatch):
    with_proc = devices.get_free_host_memory(), devices._measure_resident_peak()
    monkeypatch.setattr(devices, "Path", lambda *parts: REPOSITORY / "absent")
    without = devices.get_free_host_memory(), devices._measure_resident_peak()
    assert without[0] >= 0.3 * with_proc[0]
    assert without[1] >= 0.5 * with_proc[1]
