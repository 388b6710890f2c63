"""Merging after 4-bit training: into the base with the lower validation loss, or the requested one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY_TIED, make_conversations, write_tiny_tokenizer
from tests.parity.gguf_models import write_run
from tune2gguf.base.random_base import write_random_base
from tune2gguf.export.merge_choice import DEQUANTIZED, ORIGINAL
from tune2gguf.export.pipeline import export_base, export_run
from tune2gguf.model.architectures import Architecture
from tune2gguf.serve.proof import MERGED, prove_export

ARCHITECTURE = Architecture(**{**vars(TINY_TIED), "embed_dim": 64, "intermediate_dim": 128, "head_dim": 16})


def write_base(folder: Path, *, kind: str) -> Path:
    write_random_base(ARCHITECTURE, folder, kind=kind)
    write_tiny_tokenizer(folder)
    return folder


def write_nf4_run(base_dir: Path, run_dir: Path, *, num_rows: int = 4) -> Path:
    return write_run(
        base_dir, run_dir, "base_weights=nf4", chat_template="chatml", validation=make_conversations(num_rows)
    )


@pytest.fixture(params=["16-bit base, rounded while it was loaded", "4-bit base, the original beside it"])
def base_dir(request, tmp_path) -> Path:
    """The same seed gives both folders the same weights before rounding."""
    base_dir = write_base(tmp_path / "models" / "Tiny", kind="bf16")
    if request.param.startswith("4-bit"):
        base_dir = write_base(tmp_path / "models" / "Tiny-bnb-4bit", kind="bnb-4bit")
    return base_dir


@pytest.fixture
def run_dir(base_dir, tmp_path) -> Path:
    return write_nf4_run(base_dir, tmp_path / "run")


def export(run_dir: Path, **options):
    return export_run(run_dir, quantizations=["F32"], overwrite=True, show=False, **options)


def read_bytes(exported) -> bytes:
    return exported.models[0].gguf_path.read_bytes()


def test_the_base_with_the_lower_validation_loss_is_taken(run_dir):
    chosen = export(run_dir)
    losses = chosen.merge.losses
    assert losses.keys() == {ORIGINAL, DEQUANTIZED} and losses[ORIGINAL] != losses[DEQUANTIZED]
    assert chosen.merge.kind == min(losses, key=losses.get)
    better, other = chosen.merge.kind, max(losses, key=losses.get)
    best_bytes = read_bytes(chosen)
    assert best_bytes == read_bytes(export(run_dir, merge_base=better))
    assert best_bytes != read_bytes(export(run_dir, merge_base=other)), "negative control: the other one differs"


def test_measured_losses_are_those_of_the_exported_files(run_dir):
    losses = export(run_dir).merge.losses
    for kind in (ORIGINAL, DEQUANTIZED):
        proof = prove_export(export(run_dir, merge_base=kind), num_replies=0, show=False)
        assert proof.steps["F32"]["loss"] == pytest.approx(losses[kind], rel=1e-6)


def test_the_choice_is_told_in_card_and_proof(run_dir):
    chosen = export(run_dir)
    sentence = chosen.merge.describe()
    assert sentence.startswith(f"merged into the {chosen.merge.kind} weights: validation loss ")
    assert f"The adapter was {sentence}." in chosen.model_card_path.read_text()
    assert prove_export(chosen, num_replies=0, show=False).merge == sentence


def test_without_validation_rows_the_weights_that_were_trained_over_are_taken(base_dir, tmp_path):
    run_dir = write_nf4_run(base_dir, tmp_path / "run", num_rows=0)
    chosen = export(run_dir)
    assert chosen.merge.kind == DEQUANTIZED and chosen.merge.losses == {}
    assert read_bytes(chosen) == read_bytes(export(run_dir, merge_base=DEQUANTIZED))


def test_a_rounded_16_bit_base_is_the_4_bit_base(tmp_path):
    """Both forms of 4-bit training have the same dequantized weights, except for the file's rounded scales."""
    from tune2gguf.base.checkpoint import open_base

    rounded = open_base(write_base(tmp_path / "plain", kind="bf16")).round_to_nf4()
    stored = open_base(write_base(tmp_path / "nf4", kind="bnb-4bit"))
    plain = open_base(tmp_path / "plain")
    for name, spec in rounded.specs.items():
        rows = [base.read_rows(name, 0, spec.shape[0]) for base in (rounded, stored, plain)]
        largest = abs(rows[2]).max()
        assert abs(rows[0] - rows[1]).max() < 0.01 * largest
        is_changed = abs(rows[0] - rows[2]).max() > 0.05 * largest
        assert is_changed == spec.is_linear, "only the layers' matrices are in 4 bits"


def test_an_8_bit_run_is_merged_into_its_base_and_proven_against_what_it_was_trained_over(tmp_path):
    base_dir = write_base(tmp_path / "Tiny", kind="bf16")
    runs = {
        kind: write_run(
            base_dir,
            tmp_path / kind,
            f"base_weights={kind}",
            chat_template="chatml",
            validation=make_conversations(4),
        )
        for kind in ("fp8", "bf16")
    }
    exported = {kind: export(run_dir) for kind, run_dir in runs.items()}
    assert exported["fp8"].merge.kind is None and exported["fp8"].merge.describe() is None
    steps = {kind: prove_export(one, num_replies=0, show=False).steps for kind, one in exported.items()}
    # The merged file has the base without its 8-bit rounding, and the proof reports the difference.
    assert steps["bf16"][MERGED]["kl_to_adapter"] < steps["fp8"][MERGED]["kl_to_adapter"] / 2
    assert abs(steps["fp8"][MERGED]["increase"]) < 0.02


def test_an_original_of_another_model_is_refused(tmp_path):
    base_dir = write_base(tmp_path / "models" / "Tiny-bnb-4bit", kind="bnb-4bit")
    run_dir = write_nf4_run(base_dir, tmp_path / "run")
    other = Architecture(**{**vars(ARCHITECTURE), "intermediate_dim": 192})
    write_random_base(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"does not hold the 16-bit weights of .*: its config.json differs"):
        export(run_dir, original_base_dir=tmp_path / "other")
    with pytest.raises(ValueError, match="it is 4-bit, too"):
        export(run_dir, original_base_dir=shutil.copytree(base_dir, tmp_path / "copy"))
    with pytest.raises(ValueError, match="16-bit weights not found; give their folder with --original-base"):
        export(run_dir, merge_base=ORIGINAL)


def test_a_choice_that_is_none_is_refused(tiny_base, tmp_path):
    run_dir = write_run(tiny_base, tmp_path / "run", chat_template="chatml")
    with pytest.raises(ValueError, match="has one base to merge into; leave --merge-base and --original-base out"):
        export(run_dir, merge_base=ORIGINAL)
    assert export(run_dir).merge.kind is None


def test_the_script_passes_the_choice_on(tmp_path):
    run_dir = write_nf4_run(write_base(tmp_path / "Tiny", kind="bf16"), tmp_path / "run")
    command = [sys.executable, REPOSITORY / "scripts/export.py", run_dir, "--merge-base", ORIGINAL]
    command += ["--quantization", "F32", "--proof-rows", "0"]
    finished = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = (run_dir / "export" / "run-F32.gguf").read_bytes()
    assert found == read_bytes(export(run_dir, merge_base=ORIGINAL))


def test_a_plain_4_bit_base_is_exported_dequantized(tmp_path):
    base_dir = write_base(tmp_path / "nf4", kind="bnb-4bit")
    path = export_base(base_dir, tmp_path / "base.gguf", quantization="F32", chat_template="chatml", show=False)
    assert path.stat().st_size > 4 * ARCHITECTURE.vocab_size * ARCHITECTURE.embed_dim
