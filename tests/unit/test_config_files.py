"""The shipped configs: those of two models differ only where the models do, and all have the guide's values."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.unit.write_guide_tables import PAGE, write_guide_tables
from tune2gguf.config import check_values, read_config
from tune2gguf.config.components import COMPONENTS
from tune2gguf.config.keys import KEYS
from tune2gguf.config.run_spec import get_run_spec
from tune2gguf.guide import GUIDE_PARAMETERS
from tune2gguf.machine.memory import estimate_memory
from tune2gguf.runs.config_file import flatten_config

FOLDERS = ("llama3_2_1b", "llama3_2_3b", "llama3_1_8b")
CONFIGS = [REPOSITORY / "configs" / folder / f"{kind}.yaml" for folder in FOLDERS for kind in ("lora", "qlora")]
QUICKSTART = REPOSITORY / "examples/quickstart/lora.yaml"
# The guide's table of base models (its section 3).
GUIDE_BASES = {
    "llama3_2_1b/lora": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3_2_1b/qlora": "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
    "llama3_2_3b/lora": "meta-llama/Llama-3.2-3B-Instruct",
    "llama3_2_3b/qlora": "unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
    "llama3_1_8b/lora": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3_1_8b/qlora": "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
}


def get_name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def find_differences(first: Path, second: Path) -> set[str]:
    """Return the dotted keys in which two files differ."""
    first, second = (flatten_config(yaml.safe_load(path.read_text())) for path in (first, second))
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def test_every_base_of_the_guide_has_its_config():
    assert {get_name(path) for path in (REPOSITORY / "configs").rglob("*.yaml")} == GUIDE_BASES.keys()
    for path in CONFIGS:
        config = read_config(path, [])
        assert config.base_source == f"hf://{GUIDE_BASES[get_name(path)]}"
        assert config.base_dir == f"models/{GUIDE_BASES[get_name(path)].split('/')[1]}"


def test_kinds_of_a_model_differ_only_in_their_base():
    for folder in FOLDERS:
        lora, qlora = (REPOSITORY / "configs" / folder / f"{kind}.yaml" for kind in ("lora", "qlora"))
        assert find_differences(lora, qlora) == {"base_source", "base_weights", "output_dir"}


def test_models_of_a_kind_differ_only_in_the_model_and_what_it_leaves_of_memory():
    allowed = {"base_source", "output_dir", "model.architecture", "enable_activation_checkpointing"}
    for kind in ("lora", "qlora"):
        files = [REPOSITORY / "configs" / folder / f"{kind}.yaml" for folder in FOLDERS]
        for first, second in itertools.combinations(files, 2):
            assert {"base_source", "output_dir", "model.architecture"} <= find_differences(first, second) <= allowed


@pytest.mark.parametrize("path", CONFIGS, ids=get_name)
def test_config_has_every_key_once_and_floats_that_every_reader_takes(path):
    check_values(read_config(path, []))
    values = yaml.safe_load(path.read_text())
    assert set(values) == {*KEYS, *COMPONENTS}
    # Some YAML parsers read 2e-4 as text.
    assert not re.search(r"(?<![.\d])\d+e-?\d", path.read_text())
    assert isinstance(values["learning_rate"], float)


def test_guide_parameters_are_the_guides_twelve_with_its_recommendations():
    guide = "LearningRate Epochs LoraRank LoraAlpha LoraDropout MaxSeqLength WarmupSteps SchedulerType Seed BatchSize "
    assert [parameter.guide for parameter in GUIDE_PARAMETERS] == f"{guide}Quantization WeightDecay".split()
    assert [parameter.key for parameter in GUIDE_PARAMETERS] == list(KEYS)[:12]
    recommended = {"learning_rate": 1e-4, "lora_dropout": 0.1, "quantization": "Q4_K_M", "weight_decay": 0.01}
    defaults = {parameter.key: parameter.default for parameter in GUIDE_PARAMETERS}
    assert recommended.items() <= defaults.items()
    assert defaults["lora_alpha"] / defaults["lora_rank"] == 1


@pytest.mark.parametrize("path", [PAGE, *CONFIGS, QUICKSTART], ids=get_name)
def test_guide_tables_are_those_of_the_code(path):
    """After a change of tune2gguf/guide.py, run python -m tests.unit.write_guide_tables."""
    assert path.read_text() == write_guide_tables(path)


@pytest.mark.parametrize("path", CONFIGS, ids=get_name)
def test_config_has_the_recommended_values_and_hands_them_to_its_components(path):
    values = yaml.safe_load(path.read_text())
    for parameter in GUIDE_PARAMETERS:
        assert values[parameter.key] == parameter.default
        for component in parameter.component.split(", "):
            node, _, key = component.partition(".")
            if key and node in COMPONENTS:
                assert values[node][key] == f"${{{parameter.key}}}"


def read_memory(path: Path) -> list[float]:
    line = next(line for line in path.read_text().splitlines() if line.startswith("#   memory:"))
    return [float(number) for number in re.findall(r"(\d+\.\d) GB", line)]


@pytest.mark.parametrize("path", CONFIGS, ids=get_name)
def test_header_names_commands_memory_and_result(path):
    name = path.relative_to(REPOSITORY).as_posix()
    header = path.read_text().split("\n\n")[0]
    config = read_config(path, [])
    for command in (
        f"python scripts/download.py --config {name}",
        f"tune download {GUIDE_BASES[get_name(path)]} --output-dir {config.base_dir}",
        f"tune run recipes/lora_finetune.py --config {name}",
        f"tune run --nproc_per_node 2 recipes/lora_finetune.py --config {name}",
        f"python scripts/estimate_memory.py --config {name}",
        f"{config.output_dir}, then: python scripts/export.py {config.output_dir}",
    ):
        assert command in header
    expected = [
        estimate_memory(get_run_spec(config, longest_row=length, num_devices=1, parallel="replicate")).peak / 1e9
        for length in (2048, 512)
    ]
    assert read_memory(path) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("folder", FOLDERS)
def test_readme_of_a_folder_has_its_commands_and_figures(folder):
    text = (REPOSITORY / "configs" / folder / "README.md").read_text()
    for kind in ("lora", "qlora"):
        path = REPOSITORY / "configs" / folder / f"{kind}.yaml"
        name, run = path.relative_to(REPOSITORY).as_posix(), read_config(path, []).output_dir
        assert GUIDE_BASES[get_name(path)] in text
        for command in (
            f"python scripts/download.py --config {name}\n",
            f"tune run recipes/lora_finetune.py --config {name} ",
            f"python scripts/export.py {run}\n",
        ):
            assert command in text
        for memory in read_memory(path):
            assert f"| {memory:.1f} GB |" in text
    assert f"base_source=hf://{GUIDE_BASES[f'{folder}/lora']}\n" in text


def test_quickstart_has_the_keys_of_the_others():
    differences = find_differences(QUICKSTART, REPOSITORY / "configs/llama3_2_1b/lora.yaml")
    assert {key for key in differences if key.startswith(("model.", "optimizer.", "lr_scheduler."))} == {
        "model.architecture"
    }
    check_values(read_config(QUICKSTART, []))
