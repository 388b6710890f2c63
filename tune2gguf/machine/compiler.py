"""Put off the import of torch's compiler: over a second of every run's start (`python -X importtime` shows it).

torchtune's decoder, torch's optimizers and its checkpoints import torch._dynamo only to say that a function must not be
compiled. A stand-in takes its place until anything else of it is used, such as by torch.compile.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from threading import Lock
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"
_swap = Lock()


class PostponedCompiler(ModuleType):
    """A stand-in for torch._dynamo; any name but these two, and any of its modules, imports the real one."""

    __path__ = ()

    @staticmethod
    def disable(fn: Callable | None = None, *arguments: Any, **options: Any) -> Callable:
        """Return a function that is not compiled, or a decorator, as the real one does."""
        if fn is None:
            return lambda function: PostponedCompiler.disable(function, *arguments, **options)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            if is_postponed():
                return fn(*args, **kwargs)
            if not hasattr(call, "disabled"):
                call.disabled = import_module(_NAME).disable(fn, *arguments, **options)
            return call.disabled(*args, **kwargs)

        return call

    @staticmethod
    def graph_break(*arguments: Any, **options: Any) -> None:
        """Do nothing: no graph is being made."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(load_compiler(), name)


class _ModuleFinder:
    """A meta path finder that imports the real compiler before one of its modules."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{_NAME}.") or not is_postponed():
            return None
        load_compiler()
        return ModuleSpec(name, _ModuleFinder)

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        return import_module(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Do nothing: the module is the real one."""


def postpone_compiler() -> None:
    """Put the stand-in in place of torch's compiler, unless that is imported already."""
    if _NAME not in sys.modules:
        sys.modules[_NAME] = import_module("torch")._dynamo = PostponedCompiler(_NAME)
        sys.meta_path.insert(0, _ModuleFinder)


def is_postponed() -> bool:
    """Whether the stand-in is in place."""
    return isinstance(sys.modules.get(_NAME), PostponedCompiler)


def load_compiler() -> ModuleType:
    """Import the real module in place of the stand-in, and return it."""
    with _swap:
        if is_postponed():
            sys.meta_path.remove(_ModuleFinder)
            del sys.modules[_NAME], import_module("torch")._dynamo
    return import_module(_NAME)
