"""Wrong configs: refused with a way out, before any weight is read or file written."""

import csv
import gzip
import io
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes.lora_finetune import recipe_main
from tests.conftest import (
    REPOSITORY,
    TINY_TIED,
    make_conversations,
    write_rows,
    write_tiny_base,
    write_tiny_tokenizer,
)
from tune2gguf.base.layout import list_tensors
from tune2gguf.base.safetensors_file import TensorToWrite
from tune2gguf.config import check_config, load_config, read_config
from tune2gguf.model.architectures import LLAMA3_1_8B

LOGGER = "metric_logger._component_"
# (overrides, part of the message)
WRONG = [
    # Unknown keys, at any depth, and the nearest known key.
    (["lora_rnk=8"], "unknown config key 'lora_rnk'; did you mean 'lora_rank'?"),
    (["learning-rate=1e-4"], "unknown config key 'learning-rate'; did you mean 'learning_rate'?"),
    (["LearningRate=1e-4"], "unknown config key 'LearningRate'; did you mean 'learning_rate'?"),
    (["Epochs=3"], "unknown config key 'Epochs'; did you mean 'epochs'?"),
    (["LoraRank=8"], "unknown config key 'LoraRank'; did you mean 'lora_rank'?"),
    (["LoraAlpha=8"], "unknown config key 'LoraAlpha'; did you mean 'lora_alpha'?"),
    (["LoraDropout=0.1"], "unknown config key 'LoraDropout'; did you mean 'lora_dropout'?"),
    (["MaxSeqLength=64"], "unknown config key 'MaxSeqLength'; did you mean 'max_seq_len'?"),
    (["WarmupSteps=1"], "unknown config key 'WarmupSteps'; did you mean 'warmup_steps'?"),
    (["SchedulerType=linear"], "unknown config key 'SchedulerType'; did you mean 'scheduler'?"),
    (["Seed=1"], "unknown config key 'Seed'; did you mean 'seed'?"),
    (["BatchSize=1"], "unknown config key 'BatchSize'; did you mean 'batch_size'?"),
    (["Quantization=Q8_0"], "unknown config key 'Quantization'; did you mean 'quantization'?"),
    (["WeightDecay=0"], "unknown config key 'WeightDecay'; did you mean 'weight_decay'?"),
    (["lr=1e-4"], "unknown config key 'lr'; did you mean 'learning_rate'?"),
    (["checkpointer.checkpoint_dir=x"], "unknown config key 'checkpointer'; did you mean 'base_dir'?"),
    (["loss=torch.nn.CrossEntropyLoss"], "unknown config key 'loss'; the loss is always the cross entropy"),
    (["metric_logger.log_dir=x"], "metric_logger needs a _component_, the dotted path of a class or function"),
    (["metric_logger=tensorboard"], "metric_logger needs a _component_"),
    ([f"{LOGGER}=torchtune.training.metric_logging.TensorboardLogger"], "metric_logger._component_=torchtune.training"),
    ([f"{LOGGER}=torchtune.training.metric_logging.TensorBoardLogger"], "missing config key 'metric_logger.log_dir'"),
    (
        [f"{LOGGER}=torchtune.training.metric_logging.DiskLogger", "metric_logger.log_dirs=x"],
        "unknown config key 'metric_logger.log_dirs'; did you mean 'metric_logger.log_dir'?",
    ),
    (
        [f"{LOGGER}=torchtune.training.metric_logging.WandBLogger"],
        "metric_logger: WandBLogger needs the package wandb, which is not installed: pip install wandb",
    ),
    (["shuffle=true"], "unknown config key 'shuffle'; the order of the rows follows from seed"),
    (["model.lora_rnk=8"], "unknown config key 'model.lora_rnk'; did you mean 'model.lora_rank'?"),
    (["model.use_dora=true"], "unknown config key 'model.use_dora'; a GGUF adapter cannot hold DoRA's magnitudes"),
    (["model.quantize_base=true"], "unknown config key 'model.quantize_base'; did you mean 'base_weights'?"),
    (["tokenizer.path=x"], "unknown config key 'tokenizer.path'; did you mean 'base_dir'?"),
    (["tokenizer.max_seq_len=64"], "unknown config key 'tokenizer.max_seq_len'; set max_seq_len"),
    (["dataset.fils=[x]"], "unknown config key 'dataset.fils'; did you mean 'dataset.files'?"),
    (["dataset.data_files=x"], "unknown config key 'dataset.data_files'; did you mean 'dataset.files'?"),
    (["dataset.seed=1"], "unknown config key 'dataset.seed'; did you mean 'seed'?"),
    (["optimizer.weight_decy=0"], "unknown config key 'optimizer.weight_decy'; did you mean 'optimizer.weight_decay'?"),
    (["optimizer.betas.first=0.9"], "unknown config key 'optimizer.betas.first'; optimizer.betas holds a value"),
    (["lr_scheduler.warmup=3"], "unknown config key 'lr_scheduler.warmup'; did you mean "),
    # One fact, one key.
    (["optimizer.lr=3e-4"], "optimizer.lr=0.0003 contradicts learning_rate=0.001; set learning_rate only"),
    (["optimizer.lr=null"], "optimizer.lr=None contradicts learning_rate=0.001"),
    (["lr_scheduler.num_warmup_steps=9"], "lr_scheduler.num_warmup_steps=9 contradicts warmup_steps=1"),
    (["model.lora_alpha=1"], "model.lora_alpha=1 contradicts lora_alpha=4; set lora_alpha only"),
    (["model.max_seq_len=64"], "model.max_seq_len=64 contradicts max_seq_len=512"),
    # Types.
    (["lora_rank=16.0"], "lora_rank=16.0 is a number; it must be a whole number"),
    (["lora_rank=many"], "lora_rank='many' is text; it must be a whole number"),
    (["learning_rate='1e-4'"], "learning_rate='1e-4' is text; it must be a number"),
    (["seed=true"], "seed=True is a boolean; it must be a whole number"),
    (["epochs=null"], "epochs is empty; it needs a value"),
    (["output_dir="], "output_dir is empty; it needs a value"),
    (["seed=a: b"], "seed={'a': 'b'} is a mapping of keys to values; it must be a whole number"),
    (["lora_rank.inner=4"], "lora_rank={'inner': 4} is a mapping of keys to values"),
    (["enable_activation_checkpointing=1"], "enable_activation_checkpointing=1 is a whole number; it must be true or"),
    (
        ["enable_activation_offloading=true", "enable_activation_checkpointing=true"],
        "enable_activation_offloading=true with device=cpu: activations are already on the CPU",
    ),
    (
        ["enable_activation_offloading=true", "enable_activation_checkpointing=false", "device=cuda"],
        "enable_activation_offloading=true without enable_activation_checkpointing=true: moving all",
    ),
    (["scheduler=off"], "scheduler='off' is not one of cosine, linear, constant"),
    (["model.apply_lora_to_mlp=maybe"], "model.apply_lora_to_mlp='maybe' is text; it must be true or false"),
    (["model.lora_attn_modules=q_proj"], "model.lora_attn_modules='q_proj' is text; it must be a list of texts"),
    # Zeros and values outside the limits.
    (
        ["learning_rate=0"],
        "learning_rate=0 is out of range: it must be above 0 and at most 1 (at 0 nothing is learned)",
    ),
    (["learning_rate=-1e-4"], "learning_rate=-0.0001 is out of range"),
    (["learning_rate=.nan"], "learning_rate=nan is out of range"),
    (["epochs=0"], "epochs=0 is out of range: it must be at least 1 (without an epoch nothing is learned)"),
    (["lora_rank=0"], "lora_rank=0 is out of range: it must be at least 1 (an adapter of rank 0 has no weights)"),
    (["lora_alpha=0"], "lora_alpha=0 is out of range: it must be above 0 (at 0 the adapter has no effect)"),
    (["lora_dropout=1"], "lora_dropout=1 is out of range: it must be at least 0 and below 1 (at 1 the adapter gets"),
    (["lora_dropout=-0.1"], "lora_dropout=-0.1 is out of range"),
    (["max_seq_len=0"], "max_seq_len=0 is out of range: it must be at least 2 (a row needs a token to predict from"),
    (["warmup_steps=-1"], "warmup_steps=-1 is out of range: it must be at least 0"),
    (["seed=-1"], "seed=-1 is out of range: it must be at least 0 and at most 4294967295"),
    (["batch_size=0"], "batch_size=0 is out of range: it must be at least 1 (a step needs a row)"),
    (["weight_decay=-0.1"], "weight_decay=-0.1 is out of range: it must be at least 0"),
    (["gradient_accumulation_steps=0"], "gradient_accumulation_steps=0 is out of range"),
    (["max_steps_per_epoch=0"], "max_steps_per_epoch=0 is out of range: it must be at least 1 (null runs every row)"),
    (["eval_every_n_steps=0"], "eval_every_n_steps=0 is out of range: it must be at least 1 (null validates up to 10"),
    (["eval_every_n_steps=0.5"], "eval_every_n_steps=0.5 is a number; it must be a whole number"),
    (["max_val_rows=0"], "max_val_rows=0 is out of range: it must be at least 1 (null uses up to 10 % of the"),
    (
        ["early_stopping_patience=0"],
        "early_stopping_patience=0 is out of range: it must be at least 1 (null never stops",
    ),
    (["num_samples=-1"], "num_samples=-1 is out of range: it must be at least 0 (0 turns samples off)"),
    (["num_samples=null"], "num_samples is empty; it needs a value"),
    (["eval_every=5"], "unknown config key 'eval_every'; did you mean 'eval_every_n_steps'?"),
    (["early_stopping=3"], "unknown config key 'early_stopping'; did you mean 'early_stopping_patience'?"),
    (["clip_grad_norm=0"], "clip_grad_norm=0 is out of range: it must be above 0 (null turns clipping off)"),
    # Choices.
    (["scheduler=cosin"], "scheduler='cosin' is not one of cosine, linear, constant; did you mean cosine?"),
    (["quantization=q4_k_m"], "did you mean Q4_K_M?"),
    (["quantization=Q4_K_X"], "quantization='Q4_K_X' is not one of F32, F16, BF16, Q8_0, Q6_K, Q5_K_M"),
    (["base_weights=int8"], "base_weights='int8' is not one of bf16, fp32, fp8, nf4"),
    (["dtype=fp16"], "dtype='fp16' is not one of bf16, fp32"),
    (["chat_template=llama2"], "chat_template='llama2' is not one of llama3"),
    (["model.lora_attn_modules=[q_proj,o_proj]"], "may hold only q_proj, k_proj, v_proj, output_proj"),
    (["model.architecture=llama9"], "model.architecture='llama9' is not one of llama3_2_1b"),
    (
        ["model.lora_attn_modules=[]", "model.apply_lora_to_mlp=false"],
        "model.lora_attn_modules=[] and model.apply_lora_to_mlp=false leave nothing to train",
    ),
    # Components.
    (["optimizer=adamw"], "optimizer needs a _component_, the dotted path of a class or function"),
    (["model._component_=tune2gguf.model.llama.lora_lama"], "model._component_=tune2gguf.model.llama.lora_lama: "),
    (["model._component_=tune2gguf.model.llama.LORA_ATTN_MODULES"], "is a tuple, not a class or function"),
    (["lr_scheduler._component_=torch.optim.lr_scheduler.ConstantLR"], "scheduler has no effect: lr_scheduler"),
    (["optimizer.betas=[2,3]"], "optimizer cannot be built: ValueError: Invalid beta parameter at index 0: 2"),
    # Keys that contradict each other.
    (["dtype=bf16"], "base_weights=fp32 with dtype=bf16: unquantized weights are kept in dtype"),
    (["base_weights=gguf:Q4_KM"], "base_weights='gguf:Q4_KM' is not one of"),
    (["base_weights=gguf:IQ2_XS"], "base_weights='gguf:IQ2_XS' is not one of"),
    (["base_weights=gguf:Q4_K_M", "dtype=fp32"], "the weights of a GGUF are kept in bf16; use dtype=bf16"),
    (["base_weights=gguf:Q4_K_M", "quantization=Q8_0"], "trained over; use quantization=Q4_K_M"),
    (["base_weights=fp8", "compile=true"], "base_weights=fp8 with compile=true: compiled layers have no fp8 products"),
    (["device=gpu"], "device='gpu' is not one of cpu, cuda, cuda:0, cuda:1, …, mps"),
    (["device=mps"], "device=mps: torch finds no Apple GPU on this machine; use device=cpu"),
    (["device=mps", "base_weights=nf4"], "base_weights=nf4 with device=mps: not supported; use base_weights=bf16"),
    (["device=mps", "compile=true"], "compile=true with device=mps: not supported; use compile=false"),
    (["device=cuda:99"], "device=cuda:99"),
    (["max_seq_len=513"], "takes at most 512 tokens"),
    (["model.architecture=llama3_2_1b"], "num_layers: the model builder has 16, config.json has 2"),
    (["batch_size=21"], "a step takes 21 rows, but there are only 20 training rows; lower batch_size or"),
    (["gradient_accumulation_steps=6"], "a step takes 24 rows, but there are only 20 training rows"),
    (["warmup_steps=6"], "warmup_steps=6 is longer than the run of 5 steps; use at most 0, or more epochs"),
    (["dataset.validation_split=0.1"], "dataset.validation_files and dataset.validation_split are both given"),
    (["dataset.on_bad_row=ignore"], "dataset.on_bad_row=ignore is not one of error, drop"),
    (["resume=true"], "resume=true: no such checkpoint; use auto, false, or a folder checkpoints/step_N of the run"),
    (["batch_size=21", "dataset.packing=true"], "a step takes 21 packs, but there are only 20 training rows; lower"),
    (["resume=runs/absent/checkpoints/step_3"], "runs/absent/checkpoints/step_3"),
    (
        ["early_stopping_patience=2", "dataset.validation_files=null"],
        "early_stopping_patience=2 needs validation rows; hold rows out with",
    ),
    # Places.
    (["parent_run=runs/absent"], "parent_run=runs/absent is not the folder of a run (config.yaml is missing)"),
    (["base_dir=models/absent"], "no base model in models/absent. Get it with:\n  python scripts/download.py --config"),
    (["base_source=meta-llama/Llama-3.2-1B-Instruct"], "expected hf://OWNER/NAME"),
    (["dataset.files=[absent.jsonl]"], "absent.jsonl: no such file"),
    (["dataset.files=[]"], "dataset.files=[] names no file"),
    (["dataset.files=[README.md]"], "README.md: unknown type"),
    (["output_dir=README.md/run"], "output_dir=README.md/run cannot be created in"),
    (["output_dir=tests"], "output_dir=tests exists, and a run never overwrites another"),
    # Malformed overrides.
    (["lora_rank"], "overrides are written key=value; got lora_rank"),
    (["=8"], "overrides are written key=value; got =8"),
    (["seed=???"], "overrides are written key=value; got seed=???"),
    (["lora_rank=[8"], "lora_rank='[8' is text; it must be a whole number"),
    (["lora_rank=${nothing}"], "the config does not resolve: Interpolation key 'nothing' not found"),
]


def find_error(arguments: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        check_config(load_config(arguments))
    return str(error.value)


def list_files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_wrong_config_is_refused_in_words_and_writes_nothing(overrides, message, run_arguments, tmp_path):
    before = list_files(tmp_path)
    assert message in find_error([*run_arguments, *overrides])
    assert list_files(tmp_path) == before


def test_run_of_the_corpus_is_right_without_its_mistakes(run_arguments):
    """The negative control of every case above."""
    assert check_config(load_config(run_arguments)) == []
    assert len(WRONG) >= 60


def test_compiling_for_a_cpu_without_a_compiler_is_refused_with_its_name(run_arguments, monkeypatch):
    monkeypatch.setenv("CXX", "c++-that-is-absent")
    assert find_error([*run_arguments, "compile=true"]) == (
        "compile=true with device=cpu: C++ compiler c++-that-is-absent not found; install it or use compile=false"
    )
    assert check_config(load_config(run_arguments)) == []


# One of each kind through the recipe's main: exit code, one message, no traceback.
KINDS = ["lora_rnk=8", "optimizer.lr=3e-4", "epochs=0", "device=gpu", "batch_size=21", "base_dir=models/absent", "=8"]


@pytest.mark.parametrize("override", KINDS)
def test_recipe_ends_with_the_message_and_a_failing_exit_code(override, run_arguments, tmp_path, monkeypatch, capsys):
    expected = find_error([*run_arguments, override])
    monkeypatch.setattr(sys, "argv", ["lora_finetune.py", *run_arguments, override])
    with pytest.raises(SystemExit) as stopped:
        recipe_main()
    assert stopped.value.code not in (0, None)
    assert f"error: {expected}" in f"{capsys.readouterr().err}{stopped.value.code}"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["python"], ["tune", "run"]], ids=" ".join)
def test_commands_end_without_a_traceback(launcher, run_arguments, tmp_path):
    command = [str(Path(sys.executable).parent / launcher[0]), *launcher[1:], "recipes/lora_finetune.py"]
    done = subprocess.run(
        [*command, *run_arguments, "lora_rnk=8", "epochs=0"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "unknown config key 'lora_rnk'; did you mean 'lora_rank'?\n" in done.stderr and "epochs=0" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_all_problems_are_in_one_error(run_arguments):
    wrong = ["lora_rnk=8", "epochs=0", "model.lora_rnk=8", "optimizer.lr=1", "base_dir=models/absent", "device=gpu"]
    lines = find_error([*run_arguments, *wrong, "dataset.files=[absent.jsonl]", "output_dir=tests"])
    for part in ("'lora_rnk'", "epochs=0", "'model.lora_rnk'", "optimizer.lr", "models/absent", "device='gpu'"):
        assert part in lines
    assert "absent.jsonl" in lines and "output_dir=tests" in lines


def write_yaml(path: Path, replaced: dict[str, str]) -> Path:
    text = (REPOSITORY / "examples/quickstart/lora.yaml").read_text()
    for old, new in replaced.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"  weight_decay: ${weight_decay}\n": ""}, "weight_decay has no effect: optimizer.weight_decay must be "),
        ({"  lora_rank: ${lora_rank}\n": ""}, "missing config key 'model.lora_rank'"),
        (
            {"torch.optim.AdamW": "torch.optim.LBFGS"},
            "weight_decay has no effect: optimizer._component_ takes no 'weight_decay'",
        ),
        (
            {"tune2gguf.train.schedules.get_schedule": "torchtune.training.get_cosine_schedule_with_warmup"},
            "scheduler has no effect: lr_scheduler._component_ takes no 'name'; set scheduler=null and remove lr_sch",
        ),
        ({"scheduler: cosine ": "scheduler: null "}, "scheduler is empty; lr_scheduler._component_ takes 'name'"),
        ({"seed: 42 ": "sede: 42 "}, "unknown config key 'sede'; did you mean 'seed'?\nmissing config key 'seed'"),
        ({"epochs: 3 ": "epochs: 3\nepochs: 4 "}, "cannot be read as YAML"),
        ({"epochs: 3 ": "epochs 3 "}, "cannot be read as YAML"),
        ({"dataset:\n": "dataset: null\nrest:\n"}, "dataset needs a _component_"),
    ],
    ids=str,
)
def test_wrong_yaml_is_refused(replaced, message, run_arguments, tmp_path):
    run_arguments[1] = str(write_yaml(tmp_path / "wrong.yaml", replaced))
    overrides = [argument for argument in run_arguments if not ("dataset" in argument and "dataset:" in str(replaced))]
    assert message in find_error(overrides)


def test_a_schedule_of_torchtunes_takes_the_place_of_the_shipped_one(run_arguments, tmp_path):
    replaced = {
        "tune2gguf.train.schedules.get_schedule": "torchtune.training.get_cosine_schedule_with_warmup",
        "  name: ${scheduler}\n": "",
        "scheduler: cosine ": "scheduler: null ",
    }
    run_arguments[1] = str(write_yaml(tmp_path / "stock.yaml", replaced))
    assert check_config(load_config(run_arguments)) == []


@pytest.mark.parametrize("content", ["- a\n", "", "just text\n", "a: [\n", "\x00"], ids=repr)
def test_what_is_no_mapping_is_refused_with_its_name(content, tmp_path):
    (tmp_path / "wrong.yaml").write_text(content)
    assert find_error(["--config", str(tmp_path / "wrong.yaml")])
    assert "no such config; see configs/ and examples/" in find_error(["--config", str(tmp_path / "absent.yaml")])
    assert "no such config" in find_error(["--config", str(tmp_path)])


def test_values_may_hold_equals_signs_and_spaces(run_arguments, tmp_path):
    rows = write_rows(tmp_path / "my rows=1.jsonl", make_conversations(20))
    folder = tmp_path / "a = b"
    config = load_config([*run_arguments, f"dataset.files=['{rows}']", f"output_dir={folder}"])
    assert check_config(config) == []
    assert (config.dataset.files, config.output_dir) == ([str(rows)], str(folder))


@pytest.mark.parametrize(
    "overrides",
    [
        [f"learning_rate={rate}" for rate in ("2e-4",)],
        ["learning_rate=5.0e-5"],
        ["lora_alpha=8"],
        ["lora_alpha=2"],
        ["weight_decay=0.1"],
        ["weight_decay=0.001"],
        ["weight_decay=0"],
        ["lora_dropout=0.2"],
        ["lora_dropout=0"],
        ["warmup_steps=0"],
        ["seed=0"],
    ],
    ids=" ".join,
)
def test_what_the_guide_names_and_legal_zeros_are_right(overrides, run_arguments):
    assert check_config(load_config([*run_arguments, *overrides])) == []


@pytest.mark.parametrize(("alpha", "is_warned"), [(1.9, True), (2, False), (4, False), (8, False), (8.1, True)])
def test_ratio_beyond_the_guides_warns_in_its_words(alpha, is_warned, run_arguments):
    warnings = check_config(load_config([*run_arguments, f"lora_alpha={alpha}"]))
    assert len(warnings) == is_warned
    if is_warned:
        guide = "A ratio of 1 is generally recommended, but feel free to experiment with ratios of 2 or 0.5"
        assert f"lora_alpha / lora_rank = {alpha} / 4" in warnings[0] and guide in warnings[0]


@pytest.mark.parametrize("override", ["eval_every_n_steps=5", "max_val_rows=5"])
def test_key_of_validation_without_validation_rows_warns_that_it_has_no_effect(override, run_arguments):
    without = ["max_val_rows=null", "dataset.validation_files=null", override]
    (warning,) = check_config(load_config([*run_arguments, *without]))
    assert warning.startswith(f"{override} has no effect without validation rows; ")
    assert check_config(load_config([*run_arguments, override])) == []


def test_another_base_is_one_override():
    path = REPOSITORY / "configs/llama3_2_1b/qlora.yaml"
    assert read_config(path, []).base_dir == "models/Llama-3.2-1B-Instruct-bnb-4bit"
    meta = read_config(path, ["base_source=hf://meta-llama/Llama-3.2-1B-Instruct@main"])
    assert meta.base_dir == meta.model.base_dir == meta.tokenizer.base_dir == "models/Llama-3.2-1B-Instruct"
    assert read_config(path, ["base_dir=elsewhere"]).base_dir == "elsewhere"
    assert "base_dir is empty" in find_error(["--config", str(path), "base_source=null"])


def write_sparse_base(base_dir: Path) -> Path:
    """Write Llama 8B's config.json and the headers of its weights; the 16 GB of weights are a hole in the file."""
    import json

    from tune2gguf.model.architectures import make_hf_config

    base_dir.mkdir()
    (base_dir / "config.json").write_text(json.dumps(make_hf_config(LLAMA3_1_8B)))
    write_tiny_tokenizer(base_dir)
    header, begin = {}, 0
    for spec in list_tensors(LLAMA3_1_8B):
        size = TensorToWrite(spec.hf_name, "BF16", spec.shape).num_bytes
        header[spec.hf_name] = {"dtype": "BF16", "shape": list(spec.shape), "data_offsets": [begin, begin + size]}
        begin += size
    encoded = json.dumps(header).encode()
    with (base_dir / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + begin)
    return base_dir


def test_check_takes_under_a_second_and_touches_no_weight(run_arguments, tmp_path):
    base = write_sparse_base(tmp_path / "8b")
    arguments = [*run_arguments, f"base_dir={base}", "model.architecture=llama3_1_8b", "max_seq_len=2048"]
    warnings = check_config(load_config(arguments))  # imports what is slow; a small disk is warned of
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    assert check_config(load_config(arguments)) == warnings
    assert "lora_rnk" in find_error([*arguments, "lora_rnk=8"])
    assert (time.process_time() - started) / 2 < 1.0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 100e6
    assert (base / "model.safetensors").stat().st_blocks * 512 < 1e6


def test_matrices_that_8_bit_products_do_not_take_are_refused(run_arguments, tmp_path):
    base = write_tiny_base(tmp_path / "odd", replace(TINY_TIED, intermediate_dim=72))
    arguments = [*run_arguments, f"base_dir={base}"]
    assert check_config(load_config(arguments)) == []
    error = find_error([*arguments, "base_weights=fp8"])
    assert "mlp.gate_proj.weight is [72, 32], fp8 products need multiples of 16; use base_weights=bf16" in error


def test_four_bit_base_with_16_bit_settings_warns(run_arguments, tmp_path):
    from tune2gguf.base.random_base import write_random_base

    narrow = write_random_base(TINY_TIED, tmp_path / "narrow", kind="bnb-4bit")
    write_tiny_tokenizer(narrow)
    assert "4-bit query and key weights share blocks" in find_error([*run_arguments, f"base_dir={narrow}"])
    base = write_random_base(replace(TINY_TIED, embed_dim=64), tmp_path / "4bit", kind="bnb-4bit")
    write_tiny_tokenizer(base)
    arguments = [*run_arguments, f"base_dir={base}", "dtype=bf16"]
    assert check_config(load_config([*arguments, "base_weights=nf4"])) == []
    (in_16_bit,) = check_config(load_config([*arguments, "base_weights=bf16"]))
    assert "base_weights=bf16" in in_16_bit and "use base_weights=nf4" in in_16_bit
    (large_export,) = check_config(load_config([*arguments, "base_weights=nf4", "quantization=F16"]))
    assert "quantization=F16" in large_export
    (other_base,) = check_config(load_config([*arguments, "base_weights=nf4", "base_source=hf://owner/name"]))
    assert "holds random weights, not base_source=hf://owner/name" in other_base


def test_damaged_base_is_found_by_its_headers(run_arguments, tmp_path):
    from tests.conftest import TINY_TIED
    from tune2gguf.base.random_base import write_random_base

    base = write_random_base(TINY_TIED, tmp_path / "base")
    assert "has no tokenizer" in find_error([*run_arguments, f"base_dir={base}"])
    write_tiny_tokenizer(base)
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert str(weights) in find_error([*run_arguments, f"base_dir={base}"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet"])
@pytest.mark.parametrize("num_rows", [12, 3])
def test_rows_are_counted_before_anything_slow_as_the_run_reads_them(run_arguments, tmp_path, name, num_rows):
    rows = [{"prompt": f"Question {n}?", "completion": f"Answer\n\n{n}\u2028\r."} for n in range(num_rows)]
    path = write_table(tmp_path / name, rows)
    arguments = [*run_arguments, f"dataset.files=[{path}]", "warmup_steps=0"]
    if num_rows == 12:
        assert check_config(load_config(arguments)) == []
    else:
        assert find_error(arguments) == (
            "a step takes 4 rows, but there are only 3 training rows; lower batch_size or gradient_accumulation_steps"
        )


@pytest.mark.parametrize("content", ["[{{}}\n]", "[{}]", " \n[\n{}\n]", "{}\r\n\r\n{}\r\n\n \n"])
def test_rows_are_counted_where_the_name_says_lines_and_the_content_is_another(run_arguments, tmp_path, content):
    row = json.dumps({"prompt": "Question?", "completion": "Answer.\x85"}, ensure_ascii=False)
    inside = row if content.count("{}") > 1 else ",".join([row] * 2)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.replace("{{}}", "{}").replace("{}", inside).encode())
    arguments = [*run_arguments, f"dataset.files=[{path}]", "warmup_steps=0"]
    assert "there are only 2 training rows" in find_error(arguments)


def test_file_that_cannot_be_read_to_its_end_is_said_before_anything_slow(run_arguments, tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "a", "completion": "b"},')
    message = find_error([*run_arguments, f"dataset.files=[{tmp_path / 'a.json'}]"])
    assert message.startswith(f"{tmp_path / 'a.json'}, row 2: malformed JSON")


def write_table(path: Path, rows: list[dict]) -> Path:
    text = io.StringIO(newline="")
    if ".csv" in path.name:
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    elif path.suffix == ".json":
        json.dump(rows, text)
    else:
        text.writelines(json.dumps(row, ensure_ascii=False) + "\r\n\r\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        content = text.getvalue().encode()
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path
