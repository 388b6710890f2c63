import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

# What exports, reports, verdicts and benchmarks need; datasets and pandas come with torchtune itself, and the export's
# checks, which are made at the start, need gguf.
LATE = (
    "xllamacpp",
    "matplotlib",
    "scipy",
    "jinja2",
    "transformers",
    "peft",
    "bitsandbytes",
    "huggingface_hub.cli",
)


@pytest.mark.slow
def test_nothing_is_imported_before_the_first_step_that_it_does_not_need(run_arguments):
    program = f"""
import json, sys
from recipes.lora_finetune import LoRAFinetuneRecipe, check_config, load_config

cfg = load_config({run_arguments!r})
LoRAFinetuneRecipe(cfg, check_config(cfg)).setup()
print(json.dumps([name for name in {LATE!r} if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
