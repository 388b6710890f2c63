"""Training over the values of the base's GGUF, and serving that file with the adapter."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_run_arguments
from tests.recipes.launch import read_outcome, run_to_end
from tests.recipes.test_resume import HARD, kill_and_resume
from tests.recipes.test_training import read_records, run_recipe
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.load import load_base
from tune2gguf.export.measure.weight_sources import open_gguf_source
from tune2gguf.export.pipeline import export_base, export_run, find_served_files
from tune2gguf.ggml.kernels import load_kernels
from tune2gguf.model.llama import lora_llama
from tune2gguf.runs.run import open_run
from tune2gguf.serve.before_after import answer_before_and_after
from tune2gguf.serve.proof import ADAPTER, BASE, prove_export

OVER_Q4_K_M = ["dtype=bf16", "base_weights=gguf:Q4_K_M", "quantization=Q4_K_M"]


@pytest.fixture(scope="module")
def run_dir(wide_base, tmp_path_factory) -> Path:
    """Return a run over true K-quants."""
    folder = tmp_path_factory.mktemp("runs") / "over-gguf"
    arguments = [
        *make_run_arguments(folder.parent, wide_base),
        *OVER_Q4_K_M,
        "epochs=2",
        "learning_rate=0.01",
        f"output_dir={folder}",
    ]
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_recipe(arguments, monkeypatch)
    return folder


def test_a_run_learns_and_says_how_it_is_served(run_dir):
    losses = [record["val_loss"] for record in read_records(run_dir, "val_loss")]
    assert losses[-1] < 0.9 * losses[0]
    assert "served: the base in Q4_K_M and the adapter beside it, as trained" in (run_dir / "plan.json").read_text()


def test_the_file_holds_what_was_trained_over(run_dir, wide_base, tmp_path):
    export = export_run(run_dir, overwrite=True, show=False)
    assert export.models == [] and export.adapter.quantization == "Q4_K_M"
    plain = export_base(wide_base, tmp_path / "x.gguf", quantization="Q4_K_M", chat_template="chatml", show=False)
    stored = open_base(wide_base)
    served, alone = (open_gguf_source(path, stored, load_kernels()) for path in (export.adapter.base_path, plain))
    model = lora_llama(
        str(wide_base),
        architecture=None,
        lora_rank=4,
        lora_alpha=4,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj"],
        apply_lora_to_mlp=False,
        max_seq_len=64,
    )
    load_base(model, str(wide_base), device=torch.device("cpu"), base_weights="gguf:Q4_K_M", show=False)
    trained = dict(model.decoder.named_parameters())
    for name, spec in stored.specs.items():
        rows = served.read(name)
        assert torch.equal(rows, alone.read(name))
        assert np.array_equal(rows.numpy(), export.merge.trained.read_rows(name, 0, spec.shape[0]))
        found = trained[name].detach()
        assert torch.equal(found, rows.to(found.dtype))
        if spec.is_linear:
            original = torch.from_numpy(stored.read_rows(name, 0, spec.shape[0]))
            assert not torch.equal(rows, original), "negative control: a type loses something"


def test_what_was_trained_is_what_is_served(run_dir):
    export = export_run(run_dir, overwrite=True, show=False)
    proof = prove_export(export, num_rows=6, show=False)
    assert [failure for failure in proof.failures if "did not end" not in failure] == []
    assert list(proof.steps) == [BASE, ADAPTER, "Q4_K_M + adapter"]
    served = proof.served_by_llama_cpp["Q4_K_M + adapter"]
    assert abs(proof.steps["Q4_K_M + adapter"]["increase"]) < 1e-5
    assert served["tokens"]["num_different"] == 0
    assert abs(served["scores"]["loss_by_llama_cpp"] - served["scores"]["loss_by_torch"]) < 0.02
    modelfile = export.adapter.modelfile_path.read_text()
    assert "FROM ./over-gguf-base-Q4_K_M.gguf\nADAPTER ./over-gguf-adapter.gguf\n" in modelfile
    assert "ollama create over-gguf -f Modelfile-adapter" in export.model_card_path.read_text()
    assert find_served_files(open_run(run_dir)) == (export.adapter.base_path, export.adapter.adapter_path)
    assert export.served == export.adapter
    answers = answer_before_and_after(run_dir, num_questions=1)
    assert len(answers) == 1


def test_merged_and_quantized_again_it_loses_what_it_was_trained_around(run_dir):
    """Negative control for serving two files: merged in the same type."""
    export = export_run(run_dir, quantizations=["Q4_K_M"], overwrite=True, show=False)
    assert [model.quantization for model in export.models] == ["Q4_K_M"]
    steps = prove_export(export, num_rows=6, show=False).steps
    assert steps["Q4_K_M"]["kl_to_adapter"] > 100 * abs(steps["Q4_K_M + adapter"]["kl_to_adapter"])


def test_another_type_than_the_one_trained_over_is_refused(run_arguments, monkeypatch, capsys):
    arguments = [*run_arguments, "dtype=bf16", "base_weights=gguf:Q4_K_M", "quantization=Q8_0"]
    with pytest.raises(SystemExit):
        run_recipe(arguments, monkeypatch)
    assert "use quantization=Q4_K_M" in capsys.readouterr().err


def test_what_is_not_merged_takes_no_matrix_and_no_merge_base(run_dir, tmp_path):
    with pytest.raises(ValueError, match="nothing is merged; choose a type with --quantization"):
        export_run(run_dir, merge_base="original", overwrite=True, show=False)
    with pytest.raises(ValueError, match="the adapter was trained over this GGUF"):
        export_run(run_dir, imatrix=tmp_path / "x.gguf", overwrite=True, show=False)


def test_killed_over_a_gguf_and_resumed_equals_never_stopped(run_arguments, tmp_path):
    arguments = [*run_arguments, *OVER_Q4_K_M, *HARD, "save_every_n_steps=2"]
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "log")
    assert kill_and_resume(arguments, tmp_path / "killed", [(4, 0.03)])
    assert read_outcome(tmp_path / "killed") == read_outcome(tmp_path / "whole")
