"""Let `tune run recipes/lora_finetune.py` find the recipes of the working directory.

torchtune installs a top-level `recipes` package that raises on import, and `tune run` puts the working directory last
on sys.path. tune2gguf.pth imports this module at every start of Python, so it must cost nothing: it imports only
what is loaded anyway.
"""

import os
import sys
from importlib.machinery import PathFinder

_RECIPE = os.path.join("recipes", "lora_finetune.py")
_RECIPE_SPELLINGS = ("recipes.lora_finetune", "recipes/lora_finetune.py")


class LocalRecipes:
    """A meta path finder that answers for the name `recipes` only, where the working directory has our recipe."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "recipes":
            return None
        if os.path.isfile(_RECIPE):
            return PathFinder.find_spec(name, [os.getcwd()])
        if any(argument in _RECIPE_SPELLINGS for argument in sys.orig_argv):
            sys.exit(f"{_RECIPE}: not found in {os.getcwd()}. Run the command from the root of the tune2gguf checkout.")
        return None


sys.meta_path.insert(0, LocalRecipes)
