import json
import subprocess
import sys

from tests.conftest import REPOSITORY

# Packages of exports, reports, verdicts, benchmarks, hub data and the compiler. The export's checks at the start need
# gguf.
LATE = (
    "xllamacpp",
    "matplotlib",
    "scipy",
    "jinja2",
    "transformers",
    "peft",
    "bitsandbytes",
    "huggingface_hub.cli",
    "sympy",
    "datasets",
    "pandas",
)


def test_nothing_is_imported_before_the_first_step_that_it_does_not_need(run_arguments):
    program = f"""
import json, sys
from recipes.lora_finetune import LoRAFinetuneRecipe, check_config, load_config

cfg = load_config({run_arguments!r})
recipe = LoRAFinetuneRecipe(cfg, check_config(cfg))
recipe.setup()
late = [name for name in {LATE!r} if name in sys.modules]
recipe.train()
print(json.dumps(late + [name for name in sys.modules if name.startswith("torch._dynamo.")]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_tune_imports_none_of_its_other_commands_needs_for_our_recipe_and_all_of_them_else(tmp_path):
    """`tune` imports `tune download` and thereby kagglehub before it runs any recipe."""
    program = """
import sys
from torchtune._cli.tune import TuneCLIParser

sys.argv = ["tune", "--help"]
try:
    TuneCLIParser().parse_args()
except SystemExit:
    print("kagglehub" in sys.modules)
"""
    found = {}
    for argument in ("recipes/lora_finetune.py", "recipes/other.py"):
        command = [sys.executable, "-c", program, argument]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[argument] = (done.stdout.splitlines()[-1], "download" in done.stdout)
    assert found == {"recipes/lora_finetune.py": ("False", False), "recipes/other.py": ("True", True)}


def test_a_package_that_is_run_late_has_all_of_its_names():
    program = """
import sys
import tune2gguf.model.llama
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE

late = "datasets" not in sys.modules
from torchtune.models.llama3_1 import *

print(late, "datasets" in sys.modules, lora_llama3_1.__name__, sys.modules["torchtune.models.llama3_1"].llama3_1_8b)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.startswith("True True lora_llama3_1 <function llama3_1_8b"), done.stderr
