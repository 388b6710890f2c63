"""Import hooks: `tune run recipes/lora_finetune.py` finds the working directory's recipes and starts them faster.

torchtune installs a top-level `recipes` package that raises on import, and `tune run` puts the working directory last
on sys.path. tune2gguf.pth imports this module at every start of Python, so it must cost nothing: it imports only
modules that are loaded anyway.
"""

import builtins
import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

_RECIPE = os.path.join("recipes", "lora_finetune.py")
_RECIPE_SPELLINGS = ("recipes.lora_finetune", "recipes/lora_finetune.py")


def _runs_our_recipe() -> bool:
    return any(argument in _RECIPE_SPELLINGS for argument in sys.orig_argv)


class LocalRecipes:
    """A meta path finder for `recipes`, if the working directory has our recipe."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "recipes":
            return None
        if os.path.isfile(_RECIPE):
            return PathFinder.find_spec(name, [os.getcwd()])
        if _runs_our_recipe():
            sys.exit(f"{_RECIPE}: not found in {os.getcwd()}. Run the command from the root of the tune2gguf checkout.")
        return None


class LeanTorchtune:
    """A meta path finder for torchtune: imports its parts on first use, and gives it our NF4 in place of torchao's.

    torchtune imports all of its parts at once, and its data sets import `datasets` and pandas: a fifth of a run's
    start-up time. It needs names of torchao that later releases have moved, and peft refuses the releases that have
    them. torchao is replaced for torchtune alone, and only if torchtune serves this package or cannot import torchao.
    """

    is_needed = None  # until torchtune is imported; then the same for all of its parts

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] != "torchtune":
            return None
        if name == "torchtune":
            cls.is_needed = _serves_this_package() or not _has_torchao_of_then()
            if _serves_this_package():
                import_module("tune2gguf.machine.compiler").postpone_compiler()
        found = PathFinder.find_spec(name, path) if cls.is_needed else None
        if found is None or found.loader is None:
            return found
        if name != "torchtune":
            found.loader = (LateLoader if name == "torchtune.models.llama3_1" else LeanLoader)(found.loader)
            return found
        spec = ModuleSpec(name, LeanTorchtune, origin=found.origin, is_package=True)
        spec.submodule_search_locations = found.submodule_search_locations
        spec.has_location = True
        return spec

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        def get_part(name):
            if name not in ("datasets", "generation", "models", "modules", "utils"):
                raise AttributeError(f"module 'torchtune' has no attribute {name!r}")
            return import_module(f"torchtune.{name}")

        module.__getattr__ = get_part


def _serves_this_package() -> bool:
    return _runs_our_recipe() or any(name.startswith("tune2gguf.") and name != __name__ for name in sys.modules)


def _has_torchao_of_then() -> bool:
    torchao = PathFinder.find_spec("torchao")
    return torchao is not None and os.path.isfile(os.path.join(os.path.dirname(torchao.origin), "dtypes/nf4tensor.py"))


class LeanLoader:
    """A loader of torchtune's modules in which `import torchao` imports tune2gguf.model.torchao_names.

    It also turns off flex attention, which this package does not use: on a GPU it imports the compiler at every start.
    """

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__builtins__ = {**vars(builtins), "__import__": _import_for_torchtune}
        self._loader.exec_module(module)
        if module.__name__ == "torchtune.utils._import_guard":
            module._SUPPORTS_FLEX_ATTENTION = False


class LateLoader(LeanLoader):
    """A loader that runs a package when one of its own names is used; its modules can be imported before.

    Llama 3's builders import `datasets` and DTensor, its position embeddings only torch.
    """

    def exec_module(self, module):
        def get_name(name):
            if name.startswith("__") and name != "__all__":
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            del module.__getattr__
            super(LateLoader, self).exec_module(module)
            return getattr(module, name)

        module.__getattr__ = get_name


def _import_for_torchtune(name, *context, **named_context):
    if name.partition(".")[0] == "torchao":
        return import_module("tune2gguf.model.torchao_names")
    return builtins.__import__(name, *context, **named_context)


class NoDownload:
    """A meta path finder that leaves out `tune download` when our recipe runs: `tune` imports all of its commands.

    This one imports kagglehub and torchtune's checkpointers, which no run uses.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchtune._cli.download" and _runs_our_recipe():
            return ModuleSpec(name, NoDownload)
        return None

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        module.Download = NoDownload

    @staticmethod
    def create(subparsers):
        """Add nothing to the commands of `tune`."""


sys.meta_path[:0] = [LocalRecipes, NoDownload, LeanTorchtune]
