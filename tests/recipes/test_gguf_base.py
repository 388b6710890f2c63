"""Training over the values of the base's GGUF, and serving that file with the adapter."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from tests.conftest import make_run_arguments
from tests.recipes.launch import read_outcome, run_to_end
from tests.recipes.test_resume import HARD, kill_and_resume
from tests.recipes.test_training import read_records, run_recipe
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.gguf_weights import list_stored
from tune2gguf.base.load import load_base
from tune2gguf.export.folder import find_served_files
from tune2gguf.export.gguf_files import write_gguf_files
from tune2gguf.export.importance_choice import ImportanceChoice
from tune2gguf.export.measure.importance import measure_importance
from tune2gguf.export.measure.weight_sources import open_base_source, open_gguf_source
from tune2gguf.export.pipeline import export_base, export_run
from tune2gguf.ggml.types import QUANTIZATIONS
from tune2gguf.model.llama import lora_llama
from tune2gguf.runs.run import open_run
from tune2gguf.serve.before_after import answer_before_and_after
from tune2gguf.serve.proof import ADAPTER, BASE, MAX_SCORE_DIFFERENCE, prove_export
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES

OWN = "Theirs.Q4_K_M.gguf"
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
    served, alone = (open_gguf_source(path, stored) for path in (export.adapter.base_path, plain))
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
    difference = abs(served["scores"]["loss_by_llama_cpp"] - served["scores"]["loss_by_torch"])
    assert difference < MAX_SCORE_DIFFERENCE < proof.steps[BASE]["increase"], "negative control: without the adapter"
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


def write_gguf_folder(folder: Path, base: Path, gguf_path: Path) -> Path:
    """Write a base folder with a GGUF in place of the safetensors."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    shutil.copyfile(gguf_path, folder / OWN)
    return folder


@pytest.fixture
def own_gguf(wide_base, tmp_path) -> Path:
    """Return a base folder with a GGUF quantized with a matrix, unlike our own rounding, and another chat template."""
    base, quantization = open_base(wide_base), QUANTIZATIONS["Q4_K_M"]
    matrix = measure_importance(open_base_source(base, adapter=None), [[5, 9, 3, 7] * 8], name="x", dataset="")
    write_gguf_files(
        {quantization: tmp_path / "theirs.gguf"},
        base=base,
        adapter=None,
        name="theirs",
        chat_template=CHAT_TEMPLATES["chatml"].with_tools(),
        importance=ImportanceChoice(matrix, frozenset([quantization])),
        num_threads=1,
        show=False,
    )
    return write_gguf_folder(tmp_path / "own", wide_base, tmp_path / "theirs.gguf")


def test_over_a_users_own_gguf_that_very_file_is_trained_over_and_served(own_gguf, wide_base, tmp_path, monkeypatch):
    folder = tmp_path / "runs/mine"
    arguments = [*make_run_arguments(tmp_path, own_gguf), *OVER_Q4_K_M, "learning_rate=0.01"]
    run_recipe([*arguments, f"output_dir={folder}"], monkeypatch)
    losses = [record["val_loss"] for record in read_records(folder, "val_loss")]
    assert losses[-1] < losses[0]
    export = export_run(folder, with_merged_hf=True, show=False)
    served, theirs = (list_stored(path) for path in (export.adapter.base_path, own_gguf / OWN))
    assert served.keys() == theirs.keys()
    for name, stored in theirs.items():
        assert served[name].ggml_type == stored.ggml_type and np.array_equal(served[name].data, stored.data)
    proof = prove_export(export, num_rows=6, show=False)
    assert abs(proof.steps["Q4_K_M + adapter"]["increase"]) < 1e-5
    assert proof.served_by_llama_cpp["Q4_K_M + adapter"]["tokens"]["num_different"] == 0, "the template is the run's"
    rounded, file = open_base(wide_base).round_to_gguf("Q4_K_M"), open_base(own_gguf)
    names = [name for name, spec in file.specs.items() if spec.is_linear]
    assert any(not np.array_equal(rounded.read_rows(name, 0, 8), file.read_rows(name, 0, 8)) for name in names), (
        "negative control: our own rounding gives other values"
    )
    merged = open_base(export.merged_dir)
    assert merged.gguf_path is None and merged.architecture == file.architecture
    with pytest.raises(ValueError, match="is the only base to merge into"):
        export_run(folder, quantizations=["Q8_0"], merge_base="original", overwrite=True, show=False)
    assert export_run(folder, quantizations=["Q8_0"], overwrite=True, show=False).models[0].gguf_path.is_file()
    # Another file under the same name is another base.
    export_base(wide_base, tmp_path / "plain.gguf", quantization="Q4_K_M", chat_template="chatml", show=False)
    shutil.copyfile(tmp_path / "plain.gguf", own_gguf / OWN)
    with pytest.raises(ValueError, match="is not the base that"):
        export_run(folder, overwrite=True, show=False)


@pytest.mark.parametrize("overrides", [[], ["base_weights=bf16"], ["base_weights=gguf:Q8_0", "quantization=Q8_0"]])
def test_a_folder_with_a_gguf_says_what_it_is_trained_with(overrides, own_gguf, tmp_path, monkeypatch, capsys):
    arguments = make_run_arguments(tmp_path, own_gguf)
    with pytest.raises(SystemExit):
        run_recipe([*arguments, "dtype=bf16", *overrides], monkeypatch)
    error = capsys.readouterr().err
    assert "Theirs.Q4_K_M.gguf holds Q4_K_M; use base_weights=gguf:Q4_K_M quantization=Q4_K_M" in error


def test_another_models_gguf_is_refused_with_what_differs(own_gguf, wide_base, tmp_path):
    config = json.loads((own_gguf / "config.json").read_text())
    (own_gguf / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"\n  num_layers is 2, expected 1\n  norm_eps is 1e-05, expected 0.5"):
        open_base(own_gguf)
    shutil.copyfile(own_gguf / OWN, own_gguf / "another.gguf")
    with pytest.raises(ValueError, match=r"has Theirs\.Q4_K_M\.gguf, another\.gguf; keep"):
        open_base(own_gguf)
    (own_gguf / "another.gguf").unlink()
    (own_gguf / OWN).write_bytes(b"no GGUF")
    with pytest.raises(ValueError, match=r"Theirs\.Q4_K_M\.gguf: cannot be read as GGUF"):
        open_base(own_gguf)


def test_tensors_of_unreadable_types_are_named(tmp_path):
    writer = GGUFWriter(tmp_path / "odd.gguf", "llama")
    for name, dtype in (("a", np.float32), ("b", np.float64), ("c", np.int32)):
        writer.add_tensor(name, np.zeros((2, 32), dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"odd\.gguf: has tensors of unreadable types: F64 \(b\), I32 \(c\); "):
        list_stored(tmp_path / "odd.gguf")


def test_beside_safetensors_a_gguf_is_not_the_base(own_gguf, wide_base):
    shutil.copyfile(wide_base / "model.safetensors", own_gguf / "model.safetensors")
    assert open_base(own_gguf).gguf_path is None


def test_a_gguf_with_another_vocabulary_is_refused(own_gguf, tmp_path, monkeypatch, capsys):
    """It has the same size, so that only the words tell."""
    text = (own_gguf / "tokenizer.json").read_text()
    assert text.count("<|unused_3|>") > 0
    (own_gguf / "tokenizer.json").write_text(text.replace("<|unused_3|>", "<|other_3|>"))
    with pytest.raises(SystemExit):
        run_recipe([*make_run_arguments(tmp_path, own_gguf), *OVER_Q4_K_M], monkeypatch)
    error = capsys.readouterr().err
    assert (
        "tokenizer.ggml.tokens has '<|unused_3|>' as entry" in error
        and "but '<|other_3|>' in the base folder's tokenizer; take the tokenizer files of" in error
    )
