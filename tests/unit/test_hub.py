"""Downloads from a hub on loopback, with the user's script."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY_TIED
from tests.unit.fake_hub import COMMIT, FakeHub
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.hub import HubFile, HubRevision, check_free_disk, choose_files
from tune2gguf.base.random_base import write_random_base
from tune2gguf.model.architectures import Architecture

GATED = "meta-llama/Llama-3.2-1B-Instruct"
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def repo_files(tmp_path_factory) -> dict[str, bytes]:
    """Return a repository like Meta's: indexed shards, two tokenizers, and files that must never be downloaded."""
    base = write_random_base(TINY_TIED, tmp_path_factory.mktemp("repo") / "base", max_shard_bytes=40_000)
    (base / "base.json").unlink()
    files = {path.name: path.read_bytes() for path in base.iterdir()}
    assert sum(name.endswith(".safetensors") for name in files) > 1
    files |= {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "original/tokenizer.model": b"x"}
    never = ("original/consolidated.00.pth", "original/params.json", "pytorch_model.bin", "modeling.py", "README.md")
    return files | {name: b"never" for name in never}


@pytest.fixture
def hub(repo_files):
    hub = FakeHub({GATED: repo_files, "someone/tiny": repo_files}, gated={GATED}, tokens={SECRET})
    servers = hub.start()
    yield hub
    hub.resume.set()
    for server in servers:
        server.shutdown()
        server.server_close()


def make_command(tmp_path: Path, repo: str) -> list[str]:
    config = tmp_path / "config.yaml"
    config.write_text(f"base_source: hf://{repo}\nbase_dir: {tmp_path / 'models' / 'base'}\n")
    return [sys.executable, str(REPOSITORY / "scripts/download.py"), "--config", str(config)]


def make_environment(tmp_path: Path, hub: FakeHub, token: str | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    environment |= {"TUNE2GGUF_CACHE": str(tmp_path / "cache")}
    return environment if token is None else environment | {"HF_TOKEN": token}


def run_download(tmp_path: Path, hub: FakeHub, repo: str, *, token: str | None = None) -> subprocess.CompletedProcess:
    environment = make_environment(tmp_path, hub, token)
    return subprocess.run(make_command(tmp_path, repo), env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_download_fetches_what_is_needed_and_pins_the_commit(tmp_path, hub, repo_files):
    result = run_download(tmp_path, hub, "someone/tiny")
    assert result.returncode == 0, result.stderr
    needed = {name for name in repo_files if name.startswith("model") and "modeling" not in name}
    needed |= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert hub.get_downloaded() == needed
    base = tmp_path / "models" / "base"
    assert {path.name for path in base.iterdir()} == needed | {"base.json"}
    assert all((base / name).read_bytes() == repo_files[name] for name in needed)
    record = json.loads((base / "base.json").read_text())
    assert (record["source"], record["revision"], set(record["sha256"])) == ("hf://someone/tiny", COMMIT, needed)
    assert open_base(base).architecture == TINY_TIED
    hub.requests.clear()
    again = run_download(tmp_path, hub, "someone/tiny")
    assert again.returncode == 0 and "already there" in again.stdout
    assert hub.requests == []
    shard = next(base.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    damaged = run_download(tmp_path, hub, "someone/tiny")
    assert damaged.returncode == 1 and f"changed since they were written: {shard.name}" in damaged.stderr


@pytest.mark.slow
def test_interrupted_download_continues_inside_the_file(tmp_path, hub, repo_files):
    # huggingface_hub writes in chunks of 10 MiB.
    large = Architecture(**{**vars(TINY_TIED), "vocab_size": 400_000, "rope_scaling": None})
    repo_files = {path.name: path.read_bytes() for path in write_random_base(large, tmp_path / "large").iterdir()}
    hub.repos["someone/large"] = repo_files = {**repo_files, "tokenizer.json": b"{}"}
    hub.stall_after_bytes = 11 << 20
    process = subprocess.Popen(
        make_command(tmp_path, "someone/large"),
        env=make_environment(tmp_path, hub, None),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert hub.is_stalled.wait(30)
    _wait_for_bytes(tmp_path / "models" / "base.partial", 10 << 20)
    process.send_signal(signal.SIGINT)
    assert "run the same command again to continue" in process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert not (tmp_path / "models" / "base").exists()
    hub.stall_after_bytes = None
    hub.requests.clear()
    result = run_download(tmp_path, hub, "someone/large")
    assert result.returncode == 0, result.stderr
    ranges = {byte_range for _, path, byte_range, _ in hub.requests if "model.safetensors" in path}
    assert ranges == {f"bytes={10 << 20}-"}
    base = tmp_path / "models" / "base"
    assert all(path.read_bytes() == repo_files[path.name] for path in base.iterdir() if path.name != "base.json")


def _wait_for_bytes(folder: Path, num_bytes: int) -> None:
    deadline = time.monotonic() + 30
    while max((path.stat().st_size for path in folder.glob("*.incomplete")), default=0) < num_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_damaged_file_is_refused_and_not_kept(tmp_path, hub, repo_files):
    shard = next(name for name in repo_files if name.endswith(".safetensors") and len(repo_files[name]) > 10_000)
    hub.damaged.add(shard)
    result = run_download(tmp_path, hub, "someone/tiny")
    assert result.returncode == 1 and f"{shard} arrived damaged" in result.stderr
    assert not (tmp_path / "models" / "base").exists()
    hub.damaged.clear()
    assert run_download(tmp_path, hub, "someone/tiny").returncode == 0


def test_token_reaches_the_hub_and_nobody_else(tmp_path, hub):
    result = run_download(tmp_path, hub, GATED, token=SECRET)
    assert result.returncode == 0, result.stderr
    seen = {(path.startswith("/large/"), sent) for _, path, _, sent in hub.requests if "/resolve/" in path}
    assert seen == {(False, f"Bearer {SECRET}"), (True, None)}


@pytest.mark.parametrize(
    ("repo", "token", "said"),
    [
        (GATED, None, "is gated: ask for access at {endpoint}/meta-llama/Llama-3.2-1B-Instruct"),
        (GATED, "hf_wrong", "the hub rejects the token"),
        ("someone/missing", None, "does not exist, or this token cannot see it"),
        ("someone/tiny@nowhere", None, "has no revision 'nowhere'"),
    ],
)
def test_refusal_is_one_sentence_with_the_page(tmp_path, hub, repo, token, said):
    result = run_download(tmp_path, hub, repo, token=token)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and said.format(endpoint=hub.endpoint) in lines[0]
    assert "Traceback" not in result.stderr and "hf_wrong" not in result.stderr
    if repo == GATED:
        assert "unsloth/Llama-3.2-1B-Instruct-bnb-4bit" in lines[0]
    assert not (tmp_path / "models" / "base").exists()


def test_unreachable_hub_is_one_sentence(tmp_path, hub):
    hub.endpoint = "http://127.0.0.1:9"  # the discard port, where nothing listens
    result = run_download(tmp_path, hub, "someone/tiny")
    assert result.returncode == 1 and "check the network" in result.stderr and "Traceback" not in result.stderr


def test_pickle_only_repository_is_refused(tmp_path, hub):
    hub.repos["someone/pickled"] = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"x"}
    result = run_download(tmp_path, hub, "someone/pickled")
    assert result.returncode == 1 and "no weights as safetensors" in result.stderr
    assert hub.get_downloaded() == set()


def test_original_tokenizer_is_fetched_only_where_there_is_no_other():
    names = ["config.json", "model.safetensors", "original/tokenizer.model", "original/consolidated.00.pth"]
    assert "original/tokenizer.model" in choose_files(names, repo="r")
    assert "original/tokenizer.model" not in choose_files([*names, "tokenizer.json"], repo="r")


def test_full_disk_is_found_before_the_download(tmp_path):
    revision = HubRevision("a/b", COMMIT, (HubFile("model.safetensors", 10**18, None, None),))
    with pytest.raises(ValueError, match=r"needs 1010000000\.0 GB"):
        check_free_disk(revision, tmp_path / "new" / "base.partial")
