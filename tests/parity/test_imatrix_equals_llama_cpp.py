"""The importance matrix equals llama-imatrix's, and each reads the other's files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import make_conversations, write_rows
from tests.parity import llama_cpp_oracle as oracle
from tests.parity.gguf_models import SMALL_MODELS, write_run, write_small_run
from tests.parity.make_gguf_digests import write_drawn_imatrix, write_hf_folder
from tests.runs import TRAINING_ROWS
from tune2gguf.base.checkpoint import open_base
from tune2gguf.data import Message, chat_dataset
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from tune2gguf.export.measure.importance import measure_importance
from tune2gguf.export.measure.weight_sources import open_base_source, open_merged_source
from tune2gguf.export.merge.adapter import read_adapter
from tune2gguf.export.pipeline import export_run
from tune2gguf.runs.calibration import MAX_TOKENS, format_calibration_rows, read_calibration_rows
from tune2gguf.runs.files import CALIBRATION_FILE
from tune2gguf.runs.run import open_run
from tune2gguf.serve.proof import prove_export
from tune2gguf.tokenizer.tokenizer import load_tokenizer

MODEL = SMALL_MODELS[2]  # without BOS, so that chunks are plain pieces of the text
CHUNK_SIZE, NUM_CHUNKS = 64, 6
TOLERANCE = 1e-4  # relative, per sum: theirs are float32, added one by one and over products in another order
TEXT = "".join(f"Boat {n} of {n * 37 % 1000} leaves then and there, the other {n} do not. " for n in range(40))
needs_programs = pytest.mark.skipif(
    oracle.find_missing_programs() is not None, reason=str(oracle.find_missing_programs())
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_small_run(MODEL, tmp_path_factory.mktemp("run"))


def measure(run, rows, *, is_merged: bool = True) -> ImportanceMatrix:
    base = open_base(run.base_dir)
    adapter = read_adapter(run.adapter_dir, base.specs)
    source = open_merged_source(base, adapter) if is_merged else open_base_source(base, adapter=None)
    return measure_importance(source, rows, name="ours.gguf", dataset="text.txt")


def find_difference(first: ImportanceMatrix, second: ImportanceMatrix) -> float:
    """Return the largest relative difference of two sums."""
    assert first.sums.keys() == second.sums.keys()
    return max(float((np.abs(first.sums[name] - sums) / sums).max()) for name, sums in second.sums.items())


@pytest.mark.oracle
@needs_programs
def test_sums_are_those_of_llama_imatrix(run_dir, tmp_path):
    run = open_run(run_dir)
    write_hf_folder(run_dir, tmp_path / "merged" / run.name, is_merged=True)
    oracle.convert_to_bf16(tmp_path / "merged" / run.name, tmp_path / "merged.gguf", pre="smollm")
    oracle.quantize(tmp_path / "merged.gguf", tmp_path / "merged-{}.gguf", ["F32"])
    (tmp_path / "text.txt").write_text(TEXT)
    oracle.measure_importance(
        tmp_path / "merged-F32.gguf",
        tmp_path / "text.txt",
        tmp_path / "theirs.gguf",
        chunk_size=CHUNK_SIZE,
        num_chunks=NUM_CHUNKS,
    )
    theirs = read_imatrix(tmp_path / "theirs.gguf")
    tokens = np.array(load_tokenizer(run.base_dir, chat_template=MODEL.chat_template).encode_document(TEXT)[0])
    rows = np.split(tokens[: CHUNK_SIZE * NUM_CHUNKS], NUM_CHUNKS)
    ours = measure(run, rows)
    assert find_difference(ours, theirs) < TOLERANCE
    assert (ours.counts, ours.num_chunks, ours.chunk_size) == (theirs.counts, theirs.num_chunks, theirs.chunk_size)
    assert find_difference(measure(run, rows, is_merged=False), theirs) > 100 * TOLERANCE, "negative control: the base"
    assert find_difference(measure(run, rows[1:] + rows[:1]), theirs) < TOLERANCE, "the order of chunks does not count"
    write_imatrix(tmp_path / "again.gguf", replace(theirs, name="again.gguf"))
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.slow
def test_a_matrix_is_measured_on_the_runs_own_training_rows_and_written_beside(run_dir):
    export = export_run(run_dir, quantizations=["IQ2_XS", "Q8_0"], overwrite=True, show=False)
    run = open_run(run_dir)
    assert export.imatrix_path in export.list_paths()
    written, expected = read_imatrix(export.imatrix_path), measure(run, read_calibration_rows(run_dir))
    assert find_difference(written, expected) == 0
    assert written.datasets == (CALIBRATION_FILE,)
    again = export_run(run_dir, quantizations=["IQ2_XS"], imatrix=export.imatrix_path, overwrite=True, show=False)
    assert again.models[0].gguf_path.read_bytes() == export.models[0].gguf_path.read_bytes()


@pytest.mark.slow
def test_with_validation_rows_each_type_is_quantized_the_better_way(run_dir, tmp_path):
    base_dir = open_run(run_dir).base_dir
    run_dir = write_run(base_dir, tmp_path / "run", chat_template="chatml", validation=make_conversations(6))
    names = ["Q4_0", "Q4_K_M", "Q3_K_S", "Q8_0"]

    def export(**options):
        return export_run(run_dir, quantizations=names, overwrite=True, show=False, **options)

    chosen = export()
    found = {file.quantization: file.gguf_path.read_bytes() for file in chosen.models}
    plain = {file.quantization: file.gguf_path.read_bytes() for file in export(with_importance=False).models}
    given = export(imatrix=write_again(chosen.importance.matrix, tmp_path / chosen.imatrix_path.name))
    weighted = {file.quantization: file.gguf_path.read_bytes() for file in given.models}
    assert list(chosen.importance.losses) == names[:3]
    assert len(chosen.importance.describe()) == 3
    for name, (without, with_it) in chosen.importance.losses.items():
        assert plain[name] != weighted[name] and found[name] == (weighted if with_it < without else plain)[name]
        steps = prove_export(given, num_rows=6, num_replies=0, show=False).steps
        assert steps[name]["loss"] == pytest.approx(with_it, rel=1e-6)
    assert found["Q8_0"] == plain["Q8_0"] == weighted["Q8_0"]


def write_again(matrix: ImportanceMatrix, path: Path) -> Path:
    write_imatrix(path, matrix)
    return path


def test_types_that_take_no_matrix_do_not_have_one_measured(run_dir):
    export = export_run(run_dir, quantizations=["Q8_0", "F16"], overwrite=True, show=False)
    assert export.importance.matrix is None
    with pytest.raises(ValueError, match="Q8_0 would be the same without it"):
        export_run(run_dir, quantizations=["Q8_0"], imatrix=export.imatrix_path, overwrite=True, show=False)


def test_a_type_that_needs_a_matrix_is_refused_without_one(tmp_path):
    run_dir = write_small_run(MODEL, tmp_path)
    with pytest.raises(ValueError, match="IQ2_XS needs an importance matrix; leave --no-imatrix out"):
        export_run(run_dir, quantizations=["IQ2_XS"], with_importance=False, show=False)
    (run_dir / CALIBRATION_FILE).unlink()
    with pytest.raises(ValueError, match=r"IQ2_XS needs an importance matrix, .* give a file of llama-imatrix"):
        export_run(run_dir, quantizations=["IQ2_XS"], show=False)
    importance = export_run(run_dir, quantizations=["Q4_K_M", "Q8_0"], show=False).importance
    assert importance.matrix is None, "an earlier version's run"
    assert importance.describe() == [
        "Q4_K_M without an importance matrix: the run kept no calibration.jsonl; --imatrix takes one"
    ]


def test_a_type_that_could_not_be_compared_is_named(run_dir):
    def describe(**options) -> list[str]:
        return export_run(
            run_dir, quantizations=["Q4_K_M"], overwrite=True, num_validation_rows=0, show=False, **options
        ).importance.describe()

    assert describe() == [
        "Q4_K_M without an importance matrix: there are no validation rows to compare on; --imatrix takes one"
    ]
    assert describe(with_importance=False) == [], "the user knows"


def test_a_matrix_of_another_model_or_no_matrix_at_all_is_refused(run_dir, tmp_path):
    other = write_drawn_imatrix(SMALL_MODELS[0], tmp_path / "other.gguf")
    options = {"quantizations": ["Q4_K_M"], "overwrite": True, "show": False}
    with pytest.raises(ValueError, match=r"other.gguf: .* importance matrix belongs to another model"):
        export_run(run_dir, imatrix=other, **options)
    model = export_run(run_dir, **options).models[0].gguf_path
    with pytest.raises(ValueError, match="not an importance matrix"):
        export_run(run_dir, imatrix=model, **options)
    with pytest.raises(ValueError, match="no such file"):
        export_run(run_dir, imatrix=tmp_path / "missing.gguf", **options)
    (tmp_path / "text.gguf").write_text("no matrix")
    with pytest.raises(ValueError, match="cannot be read as GGUF"):
        export_run(run_dir, imatrix=tmp_path / "text.gguf", **options)
    matrix = read_imatrix(write_drawn_imatrix(MODEL, tmp_path / "nan.gguf"))
    name = next(iter(matrix.sums))
    write_imatrix(tmp_path / "nan.gguf", replace(matrix, sums=matrix.sums | {name: matrix.sums[name] * np.nan}))
    with pytest.raises(ValueError, match="must be float32, finite and at least 0"):
        export_run(run_dir, imatrix=tmp_path / "nan.gguf", **options)


def test_a_run_keeps_training_rows_as_they_are_trained(run_dir):
    run = open_run(run_dir)
    tokenizer = load_tokenizer(run.base_dir, chat_template=MODEL.chat_template)
    conversations = [[Message(**message) for message in row["messages"]] for row in TRAINING_ROWS]
    expected = [tokenizer.encode_conversation(messages)[0][: run.max_seq_len] for messages in conversations]
    assert sorted(row.tolist() for row in read_calibration_rows(run_dir)) == sorted(expected)
    assert sum(map(len, expected)) < MAX_TOKENS


def test_no_more_tokens_are_kept_than_a_matrix_needs(run_dir, monkeypatch):
    data = chat_dataset(
        files=[str(write_rows(run_dir.with_name("rows.jsonl"), TRAINING_ROWS))],
        tokenizer=load_tokenizer(open_run(run_dir).base_dir, chat_template=MODEL.chat_template),
        max_seq_len=512,
        seed=1,
    )
    monkeypatch.setattr("tune2gguf.runs.calibration.MAX_TOKENS", 100)
    lines = format_calibration_rows(data.train, seed=1).splitlines()
    assert sum(len(json.loads(line)["tokens"]) for line in lines) == 100
    assert lines == format_calibration_rows(data.train, seed=1).splitlines()
    assert lines != format_calibration_rows(data.train, seed=2).splitlines()
