"""Hub data sets: a revision can be pinned, and the ledger has the commit."""

import json
import os
import subprocess
import sys

import pytest

from tests.unit.fake_dataset_hub import COMMITS, FakeDatasetHub

PROGRAM = """
import json, sys
from tune2gguf.data import chat_dataset
from tune2gguf.tokenizer import load_tokenizer
name, base_dir = sys.argv[1:]
tokenizer = load_tokenizer(base_dir, chat_template="chatml")
try:
    data = chat_dataset([name], tokenizer=tokenizer, max_seq_len=500, seed=1)
except ValueError as error:
    sys.exit(str(error))
print(json.dumps({"rows": len(data.train), "file": data.ledger["files"][0]}))
"""


def make_file(num_rows: int) -> bytes:
    rows = [{"prompt": f"Question {number}?", "completion": "Yes."} for number in range(num_rows)]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def hub():
    hub = FakeDatasetHub({"v1": {"train.jsonl": make_file(3)}, "main": {"train.jsonl": make_file(5)}})
    yield hub
    hub.server.shutdown()


def read(name: str, hub: FakeDatasetHub, tiny_base, tmp_path, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    environment |= {"TUNE2GGUF_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    environment |= variables
    command = [sys.executable, "-c", PROGRAM, name, str(tiny_base)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "commit"),
    [
        ("hub:someone/chats", 5, COMMITS["main"]),
        ("hub:someone/chats@v1", 3, COMMITS["v1"]),
        (f"hub:someone/chats@{COMMITS['v1']}:train[:2]", 2, COMMITS["v1"]),
    ],
)
def test_revision_is_pinned_and_its_commit_recorded(hub, tiny_base, tmp_path, name, rows, commit):
    result = read(name, hub, tiny_base, tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["rows"] == rows
    assert (found["file"]["file"], found["file"]["revision"]) == (name, commit)


def test_revision_that_is_not_there_is_one_sentence(hub, tiny_base, tmp_path):
    result = read("hub:someone/chats@v9", hub, tiny_base, tmp_path)
    assert result.returncode == 1
    assert "hub:someone/chats@v9: cannot be loaded from the hub" in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_pinned_commit_is_never_another_one_from_the_cache(hub, tiny_base, tmp_path):
    """Offline, `datasets` alone takes what is in its cache, whatever the revision."""
    assert read("hub:someone/chats", hub, tiny_base, tmp_path).returncode == 0
    offline = {"HF_HUB_OFFLINE": "1"}
    same = read(f"hub:someone/chats@{COMMITS['main']}", hub, tiny_base, tmp_path, **offline)
    assert json.loads(same.stdout)["rows"] == 5
    other = read(f"hub:someone/chats@{COMMITS['v1']}", hub, tiny_base, tmp_path, **offline)
    assert other.returncode == 1
    assert f"commit {COMMITS['v1']} is not in the cache, which holds {COMMITS['main']}" in other.stderr
    tag = read("hub:someone/chats@v1", hub, tiny_base, tmp_path, **offline)
    assert tag.returncode == 1 and "cannot be loaded from the hub" in tag.stderr
