"""Workers: the same result as one process, problems in order, no process left when the run is stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import make_conversations, write_rows
from tune2gguf.data import rows, workers
from tune2gguf.data.columns import RowReader
from tune2gguf.data.token_cache import tokenize_once
from tune2gguf.data.tokenize import TokenizedFile, tokenize_file
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer


@pytest.fixture
def tokenizer(tiny_base) -> ChatTokenizer:
    return load_tokenizer(tiny_base, chat_template="chatml")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))
    # Many blocks of a small file.
    monkeypatch.setattr(rows, "BLOCK_BYTES", 2000)


def tokenize(path, tokenizer, *, num_workers: int, stop_at_problem: bool = False) -> TokenizedFile:
    return tokenize_once(
        str(path),
        tokenizer,
        reader=RowReader(),
        stop_at_problem=stop_at_problem,
        min_cached_bytes=0,
        num_workers=num_workers,
    )


def make_mixed_rows() -> list[dict]:
    """Return rows with bad ones, many system prompts, unused keys and spelled special tokens among them."""
    made = make_conversations(300)
    for number, row in enumerate(made):
        if number % 2:
            row["messages"].insert(0, {"role": "system", "content": f"Be {number % 240}."})
        if number % 50 == 7:
            row["messages"] = []
        if number % 60 == 9:
            row["messages"][-1]["content"] += " <|im_end|> it says"
        if number % 70 == 11:
            row["topic"] = "boats"
    return made


@pytest.mark.parametrize("num_workers", [1, 3])
def test_many_processes_make_what_one_makes(tmp_path, tokenizer, num_workers):
    path = write_rows(tmp_path / "a.jsonl", make_mixed_rows())
    assert len([*rows.read_blocks(str(path))]) > 10
    alone = tokenize_file(str(path), tokenizer, reader=RowReader(), stop_at_problem=False)
    shared = tokenize(path, tokenizer, num_workers=num_workers)
    np.testing.assert_array_equal(shared.tokens, alone.tokens)
    np.testing.assert_array_equal(shared.supervised, alone.supervised)
    for key, value in vars(alone.index).items():
        np.testing.assert_array_equal(getattr(shared.index, key), value, err_msg=key)
    assert len(alone.index.problems) == 6 and len(alone.index.system_prompts) == 100


def test_blocks_make_what_the_whole_file_makes(tmp_path, tokenizer, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", make_mixed_rows())
    blocks = tokenize_file(str(path), tokenizer, reader=RowReader(), stop_at_problem=False)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 2**24)
    whole = tokenize_file(str(path), tokenizer, reader=RowReader(), stop_at_problem=False)
    np.testing.assert_array_equal(blocks.tokens, whole.tokens)
    for key, value in vars(whole.index).items():
        np.testing.assert_array_equal(getattr(blocks.index, key), value, err_msg=key)


def test_ambiguous_row_far_down_the_file_is_the_same_error_and_nothing_is_kept(tmp_path, tokenizer):
    made = make_conversations(300)
    made[250]["text"] = "rendered"
    path = write_rows(tmp_path / "a.jsonl", made)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 251: its keys fit the formats openai and text"):
        tokenize(path, tokenizer, num_workers=2)
    assert [*(tmp_path / "cache" / "tokens").iterdir()] == []


def test_bad_rows_that_stop_the_run_are_all_named_and_nothing_is_kept(tmp_path, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", make_mixed_rows())
    found = tokenize(path, tokenizer, num_workers=2, stop_at_problem=True)
    assert [line for line, _ in found.index.problems] == [8, 58, 108, 158, 208, 258]
    assert [*(tmp_path / "cache" / "tokens").iterdir()] == []


def test_file_that_changes_while_it_is_read_is_refused_and_not_kept(tmp_path, tokenizer, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(300))
    read_blocks = rows.read_blocks

    def read_and_change(name):
        for number, block in enumerate(read_blocks(name)):
            if number == 3:
                with open(name, "a") as file:
                    file.write(json.dumps(make_conversations(1, start=900)[0]) + "\n")
            yield block

    monkeypatch.setattr("tune2gguf.data.token_cache.read_blocks", read_and_change)
    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read"):
        tokenize(path, tokenizer, num_workers=0)
    assert [*(tmp_path / "cache" / "tokens").iterdir()] == []


def test_small_files_and_single_cores_start_no_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2}, raising=False)
    assert workers.count_workers(workers.MIN_SHARED_BYTES - 1) == 0
    assert workers.count_workers(workers.MIN_SHARED_BYTES) == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(500)), raising=False)
    assert workers.count_workers(2**40) == workers.MAX_WORKERS
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0}, raising=False)
    assert workers.count_workers(2**40) == 0


PROGRAM = """
import sys
from tune2gguf.data import rows
from tune2gguf.data.columns import RowReader
from tune2gguf.data.token_cache import tokenize_once
from tune2gguf.tokenizer import load_tokenizer
rows.BLOCK_BYTES = 2000
tokenizer = load_tokenizer(sys.argv[2], chat_template="chatml")
print("begins", flush=True)
tokenize_once(
    sys.argv[1], tokenizer, reader=RowReader(), stop_at_problem=True, min_cached_bytes=0, num_workers=2
)
"""


def list_workers(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle_nothing_half_stands_in_the_cache_and_no_process_goes_on(tmp_path, tiny_base, how):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(60_000))
    command = [sys.executable, "-c", PROGRAM, str(path), str(tiny_base)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    tokens = tmp_path / "cache" / "tokens"
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in tokens.glob(".*/tokens.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    children = list_workers(process.pid)
    assert len(children) == 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # like a terminal
    else:
        process.kill()
    process.communicate(timeout=60)
    assert process.returncode != 0
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    left = [path.name for path in tokens.iterdir()]
    assert all(name.startswith(".") for name in left)  # a killed process cannot remove its unfinished files
    assert how == signal.SIGKILL or left == []


@pytest.mark.slow
def test_process_that_dies_is_one_sentence(tmp_path, tokenizer, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(2000))
    start = subprocess.Popen.__init__

    def start_and_kill(self, *arguments, **options):
        start(self, *arguments, **options)
        self.kill()

    monkeypatch.setattr(subprocess.Popen, "__init__", start_and_kill)
    with pytest.raises(
        ValueError, match=r"a\.jsonl: a tokenizing process ended with exit code -9; did the machine run out of mem"
    ):
        tokenize(path, tokenizer, num_workers=2)
    assert [*(tmp_path / "cache" / "tokens").iterdir()] == []
