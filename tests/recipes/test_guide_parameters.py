"""The guide's twelve parameters: each has the guide's effect on a run. Expected values come from formulas."""

import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import tune2gguf.model.lora
from recipes.lora_finetune import LoRAFinetuneRecipe
from tests.recipes.test_training import read_adapter, read_records
from tune2gguf.config import check_config, load_config
from tune2gguf.model.architectures import ARCHITECTURES
from tune2gguf.model.llama import build_lora_llama

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


@dataclass
class Watched:
    """A finished run and the rows of each of its steps."""

    recipe: LoRAFinetuneRecipe
    folder: Path
    steps: list[list] = field(default_factory=list)

    @property
    def rows(self) -> list:
        return [row for step in self.steps for row in step]

    @property
    def adapter(self) -> dict[str, np.ndarray]:
        return read_adapter(self.folder)


def run_watched(arguments: list[str], folder: Path, *changed: str) -> Watched:
    """Run the recipe like its main, and record its training rows."""
    cfg = load_config([*arguments, f"output_dir={folder}", *changed])
    recipe = LoRAFinetuneRecipe(cfg, check_config(cfg))
    watched = Watched(recipe, folder)
    train_step = recipe._train_step

    def note_rows(indices):
        watched.steps.append([recipe.data.sequences[index] for index in indices])
        return train_step(indices)

    recipe._train_step = note_rows
    recipe.setup()
    recipe.train()
    recipe.save()
    return watched


ONE_STEP = ("max_steps_per_epoch=1", "warmup_steps=0", "clip_grad_norm=null")


def take(adapter: dict[str, np.ndarray], factor: str) -> np.ndarray:
    """Return all elements of lora_A or lora_B."""
    return np.concatenate([weight.ravel() for name, weight in sorted(adapter.items()) if f".{factor}." in name])


@pytest.mark.parametrize("rate", [1e-4, 2e-4, 5e-5])
def test_learning_rate_is_how_far_a_step_goes(rate, run_arguments, tmp_path):
    """AdamW's first step is lr * g / (|g| + eps): lr against the gradient's sign, for a gradient of any size."""
    run = run_watched(run_arguments, tmp_path / "run", *ONE_STEP, f"learning_rate={rate}", "weight_decay=0")
    moved = np.abs(take(run.adapter, "lora_B"))
    assert np.median(moved) == pytest.approx(rate, rel=1e-3)
    assert moved.max() <= rate * 1.0001
    assert [record["lr"] for record in read_records(run.folder, "loss")] == [rate]


def test_epochs_is_how_often_every_row_is_seen(run_arguments, tmp_path):
    """20 rows in steps of 2 x 3: three full steps and one of 2 rows, in three epochs of different order."""
    run = run_watched(run_arguments, tmp_path / "run", "epochs=3", "batch_size=3", "gradient_accumulation_steps=2")
    counts = Counter(row.source.line for row in run.rows)
    assert counts == dict.fromkeys(range(1, 21), 3)
    assert len(run.steps) == 3 * math.ceil(20 / 6)
    epochs = [[row.source.line for row in run.rows[start : start + 20]] for start in (0, 20, 40)]
    assert all(sorted(lines) == list(range(1, 21)) for lines in epochs)
    assert all(first != second for first, second in itertools.combinations(epochs, 2))


@pytest.mark.parametrize(
    ("name", "per_rank"),
    [
        # rank * (in + out), summed over q, k, v, output, gate, up and down of all layers.
        ("llama3_2_1b", 16 * (4096 + 2 * 2560 + 4096 + 3 * 10240)),
        ("llama3_2_3b", 28 * (6144 + 2 * 4096 + 6144 + 3 * 11264)),
        ("llama3_1_8b", 32 * (8192 + 2 * 5120 + 8192 + 3 * 18432)),
    ],
)
def test_lora_rank_is_what_the_number_of_trained_weights_is_proportional_to(name, per_rank):
    for rank in (8, 64):
        with torch.device("meta"):
            model = build_lora_llama(
                ARCHITECTURES[name],
                lora_rank=rank,
                lora_alpha=16,
                lora_dropout=0.1,
                lora_attn_modules=ATTENTION,
                apply_lora_to_mlp=True,
                max_seq_len=64,
            )
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        assert sum(trained) == rank * per_rank


def test_lora_rank_is_the_inner_width_of_every_factor(run_arguments, tmp_path):
    run = run_watched(run_arguments, tmp_path / "run", "lora_rank=3", "lora_alpha=3")
    assert {weight.shape[0] for name, weight in run.adapter.items() if "lora_A" in name} == {3}
    assert {weight.shape[1] for name, weight in run.adapter.items() if "lora_B" in name} == {3}
    assert json.loads((run.folder / "last/adapter_config.json").read_text())["r"] == 3


def test_lora_alpha_over_rank_scales_what_the_adapter_does(run_arguments, tmp_path):
    """After one small step, the validation loss changes linearly in the adapter's product."""
    changes = {}
    for alpha in (2, 4, 8):  # ratios 0.5, 1 and 2
        run = run_watched(run_arguments, tmp_path / f"{alpha}", *ONE_STEP, f"lora_alpha={alpha}", "learning_rate=1e-5")
        before, after = [record["val_loss"] for record in read_records(run.folder, "val_loss")]
        changes[alpha] = after - before
        assert json.loads((run.folder / "last/adapter_config.json").read_text())["lora_alpha"] == alpha
    assert changes[4] != 0
    assert changes[8] / changes[4] == pytest.approx(2, rel=0.05)
    assert changes[2] / changes[4] == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.2])
def test_lora_dropout_is_the_fraction_dropped_in_training_and_in_training_only(
    dropout, run_arguments, tmp_path, monkeypatch
):
    drawn, draw_keep_mask = [], tune2gguf.model.lora.draw_keep_mask

    def note_mask(x, fraction):
        drawn.append(draw_keep_mask(x, fraction))
        return drawn[-1]

    monkeypatch.setattr(tune2gguf.model.lora, "draw_keep_mask", note_mask)
    run = run_watched(run_arguments, tmp_path / "run", f"lora_dropout={dropout}")
    if dropout == 0:
        assert drawn == []
        return
    # One per input of linear layers (q k v, output, gate and up, down), layer (2) and step, whose rows share a pass.
    # Masks drawn by validation would add to these.
    assert len(drawn) == len(run.steps) * 4 * 2
    elements = sum(mask.numel() for mask in drawn)
    dropped = 1 - sum(mask.count_nonzero().item() for mask in drawn) / elements
    assert dropped == pytest.approx(dropout, abs=4 * math.sqrt(dropout * (1 - dropout) / elements))


def test_max_seq_len_is_where_longer_rows_are_cut(run_arguments, tmp_path):
    whole = run_watched(run_arguments, tmp_path / "whole")
    lengths = {row.source.line: len(row.tokens) for row in whole.rows}
    limit = sorted(lengths.values())[10]
    cut = run_watched(run_arguments, tmp_path / "cut", f"max_seq_len={limit}")
    assert {row.source.line: len(row.tokens) for row in cut.rows} == {
        line: min(length, limit) for line, length in lengths.items()
    }
    longer = [length for length in lengths.values() if length > limit]
    notes = json.loads((cut.folder / "data.json").read_text())["notes"]
    assert longer and any("truncated" in note and str(limit) in note for note in notes)


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_warmup_steps_climb_to_the_peak_and_end_there(warmup, run_arguments, tmp_path):
    changed = ("batch_size=2", "learning_rate=2e-4", f"warmup_steps={warmup}", "scheduler=constant")
    run = run_watched(run_arguments, tmp_path / "run", *changed)
    rates = [record["lr"] for record in read_records(run.folder, "loss")]
    assert rates == pytest.approx([2e-4 * min(1, (step + 1) / max(1, warmup)) for step in range(10)], rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_scheduler_is_the_closed_form_after_the_peak(name, run_arguments, tmp_path):
    changed = ("batch_size=2", "learning_rate=2e-4", "warmup_steps=3", f"scheduler={name}")
    run = run_watched(run_arguments, tmp_path / "run", *changed)
    rates = [record["lr"] for record in read_records(run.folder, "loss")]
    progress = [(step - 3) / (10 - 3) for step in range(3, 10)]
    decay = {
        "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
        "linear": lambda p: 1 - p,
        "constant": lambda p: 1.0,
    }[name]
    assert rates[2] == max(rates) == 2e-4
    assert rates[3:] == pytest.approx([2e-4 * decay(p) for p in progress], rel=1e-12)


def test_seed_decides_adapter_order_and_dropout(run_arguments, tmp_path, monkeypatch):
    masks, draw_keep_mask = [], tune2gguf.model.lora.draw_keep_mask

    def note_mask(x, fraction):
        masks[-1].append(draw_keep_mask(x, fraction))
        return masks[-1][-1]

    monkeypatch.setattr(tune2gguf.model.lora, "draw_keep_mask", note_mask)
    runs = {}
    for name, seed in (("zero", 0), ("again", 0), ("other", 1)):
        masks.append([])
        runs[name] = run_watched(run_arguments, tmp_path / name, f"seed={seed}", "lora_dropout=0.5", "weight_decay=0")
    last = "last/adapter_model.safetensors"
    assert (runs["zero"].folder / last).read_bytes() == (runs["again"].folder / last).read_bytes()
    lines = {name: [row.source.line for row in run.rows] for name, run in runs.items()}
    assert lines["zero"] == lines["again"] != lines["other"]
    # Trained A's are within a few learning rates of their start, which differs between seeds.
    first, other = (take(runs[name].adapter, "lora_A") for name in ("zero", "other"))
    assert np.abs(first - other).mean() > 10 * 1e-3
    width = min(masks[0][0].shape[0], masks[2][0].shape[0])
    assert torch.equal(masks[0][0], masks[1][0])
    assert not torch.equal(masks[0][0][:width], masks[2][0][:width])


@pytest.mark.parametrize("size", [1, 3, 8])
def test_batch_size_times_accumulation_is_the_rows_of_a_step(size, run_arguments, tmp_path):
    run = run_watched(run_arguments, tmp_path / "run", f"batch_size={size}", "gradient_accumulation_steps=2")
    full, rest = divmod(20, 2 * size)
    assert [len(step) for step in run.steps] == [2 * size] * full + [rest] * (rest > 0)


def test_quantization_changes_what_export_writes_and_nothing_else(run_arguments, tmp_path):
    from gguf import GGUFReader

    from tune2gguf.export.pipeline import export_run
    from tune2gguf.ggml.types import QUANTIZATIONS

    runs = [run_watched(run_arguments, tmp_path / name, f"quantization={name}") for name in ("Q8_0", "F16")]
    first, second = ((run.folder / "last/adapter_model.safetensors").read_bytes() for run in runs)
    assert first == second
    for run in runs:
        name = run.recipe.cfg.quantization
        (model,) = export_run(run.folder, show=False).models
        file_type = GGUFReader(model.gguf_path).fields["general.file_type"].contents()
        assert file_type == QUANTIZATIONS[name].file_type


@pytest.mark.parametrize("decay", [0, 0.001, 0.01, 0.1])
def test_weight_decay_shrinks_the_adapter_by_lr_times_decay_and_nothing_else(decay, run_arguments, tmp_path):
    """In the first step every B is zero and no A has a gradient: only decoupled weight decay changes A."""
    rate = 0.5
    fresh = run_watched(run_arguments, tmp_path / "fresh", *ONE_STEP, f"learning_rate={rate}", "weight_decay=0")
    run = run_watched(run_arguments, tmp_path / "run", *ONE_STEP, f"learning_rate={rate}", f"weight_decay={decay}")
    initial, shrunk = (take(watched.adapter, "lora_A") for watched in (fresh, run))
    np.testing.assert_allclose(shrunk, initial * (1 - rate * decay), rtol=1e-6)
    assert decay == 0 or not np.array_equal(shrunk, initial)
    bases = [
        {name: weight for name, weight in watched.recipe.model.state_dict().items() if ".lora_" not in name}
        for watched in (fresh, run)
    ]
    assert bases[0].keys() == bases[1].keys()
    assert all(torch.equal(bases[0][name], bases[1][name]) for name in bases[0])
