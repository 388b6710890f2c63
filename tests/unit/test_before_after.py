"""Before and after: base and tuned model get the same questions as files of one type, and no file is left behind."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY_TIED, make_conversations, write_tiny_base
from tests.parity.gguf_models import ALPHA, RANK, draw_adapter, write_run
from tests.runs import set_adapter
from tune2gguf.export.pipeline import export_run
from tune2gguf.model.architectures import read_architecture
from tune2gguf.serve.before_after import answer_before_and_after


@pytest.fixture
def run_dir(tiny_base, tmp_path) -> Path:
    """Make a Q4_K_M run with an adapter that changes nothing."""
    run_dir = write_run(tiny_base, tmp_path / "run", chat_template="chatml", validation=make_conversations(3))
    nothing = {name: 0 * weight for name, weight in draw_adapter(read_architecture(tiny_base)).items()}
    set_adapter(run_dir, nothing, rank=RANK, alpha=ALPHA)
    return run_dir


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_the_base_is_asked_as_a_file_of_the_tuned_ones_type(run_dir, quantization):
    export_run(run_dir, quantizations=[quantization], show=False)
    before = list_files(run_dir / "export")
    answers = answer_before_and_after(run_dir, num_questions=3)
    assert len(answers) == 3 and [answer.before for answer in answers] == [answer.after for answer in answers]
    assert list_files(run_dir / "export") == before


@pytest.mark.slow
def test_a_question_as_long_as_the_run_allows_is_answered(tmp_path):
    base_dir = write_tiny_base(tmp_path / "base", replace(TINY_TIED, max_position_embeddings=8192))
    messages = [{"role": "user", "content": "q " * 2000}, {"role": "assistant", "content": "Ahoy."}]
    run_dir = write_run(
        base_dir,
        tmp_path / "run",
        "max_seq_len=4096",
        "batch_size=1",
        chat_template="chatml",
        validation=[{"messages": messages}],
    )
    export_run(run_dir, quantizations=["F32"], show=False)
    [answer] = answer_before_and_after(run_dir, num_questions=1)
    assert answer.question == ("q " * 2000).strip()


def test_what_a_killed_one_leaves_is_cleared_by_the_next_export(run_dir):
    export_run(run_dir, quantizations=["Q8_0"], show=False)
    before = list_files(run_dir / "export")
    program = f"""
import os, runpy, signal, sys
def kill(event, arguments):
    if event == "open" and "base.gguf" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
sys.argv = ["show_result.py", {str(run_dir)!r}]
runpy.run_path("scripts/show_result.py", run_name="__main__")
"""
    killed = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, check=False)
    assert killed.returncode == -9 and list_files(run_dir / "export") != before
    export_run(run_dir, quantizations=["Q8_0"], overwrite=True, show=False)
    assert list_files(run_dir / "export") == before


def test_the_adapter_alone_is_not_taken_for_the_tuned_model(run_dir):
    export_run(run_dir, quantizations=["Q8_0"], with_adapter_gguf=True, show=False)
    (run_dir / "export" / "run-adapter.gguf").touch()
    command = [sys.executable, "scripts/show_result.py", str(run_dir), "--questions", "1"]
    finished = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_nothing_to_ask_is_said(run_dir, tiny_base, tmp_path):
    export_run(run_dir, quantizations=["Q8_0"], show=False)
    with pytest.raises(ValueError, match="--questions must be at least 1, got 0"):
        answer_before_and_after(run_dir, num_questions=0)
    texts = [{"text": "The ferry leaves at seven."}]
    other = write_run(tiny_base, tmp_path / "texts", chat_template="chatml", validation=texts)
    export_run(other, quantizations=["Q8_0"], show=False)
    with pytest.raises(ValueError, match="has no validation conversation to ask"):
        answer_before_and_after(other, num_questions=1)
