"""Cache of tokenized files: it returns the same arrays, and only for the same content, tokenizer and code."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import make_conversations, write_rows
from tune2gguf.data.columns import RowReader
from tune2gguf.data.token_cache import KEPT_DAYS, tokenize_once
from tune2gguf.data.tokenize import tokenize_file
from tune2gguf.files.digest import digest_file
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, load_tokenizer


@pytest.fixture
def tokenizer(tiny_base) -> ChatTokenizer:
    return load_tokenizer(tiny_base, chat_template="chatml")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def tokenize(path, tokenizer, **options):
    options = {"reader": RowReader(), "stop_at_problem": True, "min_cached_bytes": 0} | options
    return tokenize_once(str(path), tokenizer, **options)


def assert_equal(first, second) -> None:
    assert first.name == second.name
    np.testing.assert_array_equal(first.tokens, second.tokens)
    np.testing.assert_array_equal(first.supervised, second.supervised)
    for key, value in vars(first.index).items():
        np.testing.assert_array_equal(value, getattr(second.index, key), err_msg=key)


def test_cached_file_is_the_tokenized_file_and_mapped_into_memory(tmp_path, tokenizer, cache):
    rows = [*make_conversations(20), {"messages": []}, *make_conversations(1, start=50)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    fresh = tokenize_file(str(path), tokenizer, reader=RowReader(), stop_at_problem=False)
    cold = tokenize(path, tokenizer, stop_at_problem=False)
    [folder] = cache.iterdir()
    warm = tokenize(path, tokenizer, stop_at_problem=False)
    assert_equal(cold, fresh)
    assert_equal(warm, fresh)
    assert isinstance(warm.tokens, np.memmap)
    assert list(cache.iterdir()) == [folder]


def test_second_run_takes_the_cached_tokens(tmp_path, tokenizer, cache):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(3))
    first = tokenize(path, tokenizer)
    [folder] = cache.iterdir()
    assert tokenize(path, tokenizer).tokens.filename == folder / "tokens.bin"
    # A marked cache entry with a valid digest shows that the second result comes from the cache.
    marked = first.tokens + 1
    marked.tofile(folder / "tokens.bin")
    digests = json.loads((folder / "sha256.json").read_text())
    (folder / "sha256.json").write_text(json.dumps({**digests, "tokens.bin": digest_file(folder / "tokens.bin")}))
    assert tokenize(path, tokenizer).tokens.tolist() == marked.tolist()


def test_same_content_under_another_name_is_the_same_entry_with_its_own_name(tmp_path, tokenizer, cache):
    rows = make_conversations(3)
    tokenize(write_rows(tmp_path / "a.jsonl", rows), tokenizer)
    other = tokenize(write_rows(tmp_path / "b.jsonl", rows), tokenizer)
    assert len(list(cache.iterdir())) == 1
    assert other.name == str(tmp_path / "b.jsonl")


def test_other_content_tokenizer_or_format_is_another_entry(tmp_path, tmp_path_factory, tiny_base, tokenizer, cache):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(3))
    tokenize(path, tokenizer)
    tokenize(path, tokenizer, reader=RowReader("openai"))
    other_base = tmp_path_factory.mktemp("other")
    content = json.loads((tiny_base / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (other_base / "tokenizer.json").write_text(json.dumps(content))
    tokenize(path, load_tokenizer(other_base, chat_template="chatml"))
    tokenize(write_rows(tmp_path / "a.jsonl", make_conversations(4)), tokenizer)
    assert len(list(cache.iterdir())) == 4


def test_file_that_stops_the_run_is_not_kept(tmp_path, tokenizer, cache):
    path = write_rows(tmp_path / "a.jsonl", [*make_conversations(3), {"messages": []}, {"messages": 3}])
    stopped = tokenize(path, tokenizer)
    assert [line for line, _ in stopped.index.problems] == [4, 5]
    assert list(cache.iterdir()) == []
    # Cached with its bad rows, it reports the same ones.
    tokenize(path, tokenizer, stop_at_problem=False)
    assert tokenize(path, tokenizer).index.problems == stopped.index.problems


def test_what_was_not_used_for_long_is_deleted_when_another_file_is_kept(tmp_path, tokenizer, cache):
    def keep(count):
        before = set(cache.iterdir()) if cache.exists() else set()
        tokenize(write_rows(tmp_path / f"{count}.jsonl", make_conversations(count)), tokenizer)
        return set(cache.iterdir()) - before

    def age(folders, days):
        for folder in folders:
            os.utime(folder, (time.time() - days * 86_400,) * 2)

    used, unused, recent = keep(1), keep(2), keep(3)
    unfinished = {cache / ".key.x1.unfinished"}
    (cache / ".key.x1.unfinished").mkdir()
    age(used | unused | unfinished, KEPT_DAYS + 1)
    age(recent, KEPT_DAYS - 1)
    tokenize(tmp_path / "1.jsonl", tokenizer)
    newest = keep(4)
    assert set(cache.iterdir()) == used | recent | newest


@pytest.mark.parametrize("damaged", ["tokens.bin", "supervised.bin", "lines.npy", "digests.npy", "index.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_damaged_entry_is_made_again(tmp_path, tokenizer, cache, damaged, share):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(20))
    fresh = tokenize_file(str(path), tokenizer, reader=RowReader(), stop_at_problem=True)
    tokenize(path, tokenizer)
    [folder] = cache.iterdir()
    content = (folder / damaged).read_bytes()
    (folder / damaged).write_bytes(content[: int(len(content) * share)])
    assert_equal(tokenize(path, tokenizer), fresh)
    assert (folder / damaged).read_bytes() == content


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize("name", ["tokens.bin", "supervised.bin", "lines.npy", "index.json", "sha256.json"])
def test_entry_with_a_flipped_bit_is_made_again(tmp_path, tokenizer, cache, name, bit):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(20))
    fresh = tokenize_file(str(path), tokenizer, reader=RowReader(), stop_at_problem=True)
    tokenize(path, tokenizer)
    [folder] = cache.iterdir()
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1 << bit
    (folder / name).write_bytes(content)
    assert_equal(tokenize(path, tokenizer), fresh)
    assert_equal(tokenize(path, tokenizer), fresh)


def test_cache_that_cannot_be_written_is_one_sentence(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "file" / "cache"))
    path = write_rows(tmp_path / "a.jsonl", make_conversations(3))
    with pytest.raises(ValueError, match=r"tokenized files cannot be kept there \(Not a directory\); name another"):
        tokenize(path, tokenizer)


def test_cache_whose_folder_for_tokens_alone_cannot_be_written_is_one_sentence(tmp_path, tokenizer, cache):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(3))
    cache.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(cache)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a read-only disk needs root")
    try:
        with pytest.raises(ValueError, match=r"kept there \(Read-only file system\); .* variable TUNE2GGUF_CACHE$"):
            tokenize(path, tokenizer)
    finally:
        subprocess.run(["umount", "--lazy", str(cache)], check=True)


def test_of_several_processes_one_tokenizes(tmp_path, tokenizer, tiny_base, cache):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(2000))
    program = """
import sys
from tune2gguf.data import token_cache
from tune2gguf.data.columns import RowReader
from tune2gguf.tokenizer import load_tokenizer
base, path = sys.argv[1:]
fill = token_cache._fill
token_cache._fill = lambda *arguments, **options: print("filled") or fill(*arguments, **options)
tokenizer = load_tokenizer(base, chat_template="chatml")
found = token_cache.tokenize_once(path, tokenizer, reader=RowReader(), stop_at_problem=True, min_cached_bytes=0)
print(len(found.tokens))
"""
    command = [sys.executable, "-c", program, str(tiny_base), str(path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate()[0].split() for process in processes]
    num_tokens = str(len(tokenize(path, tokenizer).tokens))
    assert sorted(outputs) == [[num_tokens], [num_tokens], ["filled", num_tokens]]


def test_small_file_is_not_kept(tmp_path, tokenizer, cache):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(3))
    tokenize(path, tokenizer, min_cached_bytes=2**20)
    assert not cache.exists()


def test_file_without_a_good_row_is_kept_as_well(tmp_path, tokenizer, cache):
    path = write_rows(tmp_path / "a.jsonl", [{}])
    for _ in range(2):
        assert len(tokenize(path, tokenizer, stop_at_problem=False).tokens) == 0
