"""Let `tune run recipes/lora_finetune.py` find the recipes of the working directory, and start them soon.

torchtune installs a top-level `recipes` package that raises on import, and `tune run` puts the working directory last
on sys.path. tune2gguf.pth imports this module at every start of Python, so it must cost nothing: it imports only
what is loaded anyway.
"""

import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder

_RECIPE = os.path.join("recipes", "lora_finetune.py")
_RECIPE_SPELLINGS = ("recipes.lora_finetune", "recipes/lora_finetune.py")


def _runs_our_recipe() -> bool:
    return any(argument in _RECIPE_SPELLINGS for argument in sys.orig_argv)


class LocalRecipes:
    """A meta path finder that answers for the name `recipes` only, where the working directory has our recipe."""

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
    """A meta path finder for the name `torchtune` where our recipe runs: its parts are imported when they are used.

    torchtune imports all of them at once, and with its data sets `datasets` and pandas: a fifth of the time that a run
    takes to start.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchtune" or not _runs_our_recipe():
            return None
        found = PathFinder.find_spec(name)
        if found is None:
            return None
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


class NoDownload:
    """A meta path finder for `tune download` where our recipe runs: `tune` imports all its commands, and none is used.

    With that one come kagglehub and torchtune's checkpointers: an eighth of the time that a run takes to start.
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


sys.meta_path[:0] = [LocalRecipes, LeanTorchtune, NoDownload]
