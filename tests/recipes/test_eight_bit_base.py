"""Training on an 8-bit base, quantized on load."""

import pytest
import torch

from tests.recipes.launch import read_outcome, run_to_end
from tests.recipes.test_resume import HARD, kill_and_resume
from tests.recipes.test_training import measure_difference, read_records, run_recipe
from tune2gguf.base.checkpoint import open_base
from tune2gguf.export.merge.adapter import read_adapter
from tune2gguf.export.merge_choice import choose_merge_base
from tune2gguf.model.fp8 import quantize_weight
from tune2gguf.runs.run import open_run


@pytest.fixture
def fp8_arguments(run_arguments):
    return [*run_arguments, "dtype=bf16", "base_weights=fp8"]


def test_run_on_fp8_learns_close_to_a_bf16_run_and_is_merged_into_its_base(
    run_arguments, fp8_arguments, tiny_base, tmp_path, monkeypatch
):
    learning = ["epochs=3", "learning_rate=0.02"]
    run_recipe([*fp8_arguments, *learning, f"output_dir={tmp_path / 'fp8'}"], monkeypatch)
    bf16 = ["dtype=bf16", "base_weights=bf16"]
    run_recipe([*run_arguments, *bf16, *learning, f"output_dir={tmp_path / 'bf16'}"], monkeypatch)
    fp8, dense = ([r["val_loss"] for r in read_records(tmp_path / name, "val_loss")] for name in ("fp8", "bf16"))
    assert fp8[-1] < 0.8 * fp8[0]
    assert fp8 == pytest.approx(dense, rel=0.05)
    assert measure_difference(tmp_path / "fp8", tmp_path / "bf16") > 1e-3
    run = open_run(tmp_path / "fp8")
    choice = choose_merge_base(run, read_adapter(run.adapter_dir, open_base(tiny_base).specs), None)
    assert choice.kind is None
    name, stored = "layers.1.attn.q_proj.weight", open_base(tiny_base)
    exact = torch.from_numpy(stored.read_rows(name, 0, 32))
    assert torch.equal(torch.from_numpy(choice.chosen.read_rows(name, 0, 32)), exact)
    # The proof compares with the base weights of the training.
    expected = quantize_weight(exact.bfloat16()).dequantize(torch.float32)
    assert torch.equal(torch.from_numpy(choice.trained.read_rows(name, 0, 32)), expected)
    assert not torch.equal(expected, exact)


def test_killed_on_fp8_and_resumed_equals_never_stopped(fp8_arguments, tmp_path):
    arguments = [*fp8_arguments, *HARD, "save_every_n_steps=2"]
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "log")
    assert kill_and_resume(arguments, tmp_path / "killed", [(4, 0.03)])
    assert read_outcome(tmp_path / "killed") == read_outcome(tmp_path / "whole")


def test_a_run_says_that_its_device_has_no_8_bit_products(fp8_arguments, monkeypatch, capsys):
    run_recipe([*fp8_arguments, "epochs=1", "device=cpu"], monkeypatch)
    assert "matrix products: cpu has no FP8 units" in capsys.readouterr().out
