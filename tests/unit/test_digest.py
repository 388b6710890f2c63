"""A file's digest is cached while the file is unchanged; a damaged cache entry is never used."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest

from tune2gguf.files.digest import digest_file_once


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"weights" * 1000)
    return path


def get_entry(file: Path) -> Path:
    assert digest_file_once(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    [entry] = (file.parent / "cache/digests").iterdir()
    return entry


def test_digest_of_an_unchanged_file_is_not_computed_again(file):
    get_entry(file)
    before, kept = file.stat(), digest_file_once(file)
    file.write_bytes(b"WEIGHTS" * 1000)  # same size, time and inode: undetectable
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest_file_once(file) == kept
    file.write_bytes(b"changed")
    assert digest_file_once(file) == hashlib.sha256(b"changed").hexdigest()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other", "bytes", "folder", "old form"])
def test_damaged_entry_is_computed_again_and_mended(file, damage):
    entry = get_entry(file)
    content = entry.read_bytes()
    entry.unlink()
    if damage == "folder":
        entry.mkdir()
    else:
        flipped = (b"1" if content[:1] == b"0" else b"0") + content[1:]
        entry.write_bytes(
            {
                "empty": b"",
                "cut": content[:40],
                "flipped": flipped,
                "other": b"0" * 64,
                "bytes": b"\xff\xfe" * 32,
                "old form": content.split()[0],
            }[damage]
        )
    assert digest_file_once(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    if damage != "folder":
        assert entry.read_bytes() == content


@pytest.fixture
def read_only_disk(tmp_path):
    mounted = tmp_path / "disk"
    mounted.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(mounted)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("mounting a read-only disk needs root")
    yield mounted
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


def test_cache_that_cannot_be_written_costs_time_only(file, read_only_disk, monkeypatch):
    for folder in (read_only_disk, file, file / "below"):
        monkeypatch.setenv("TUNE2GGUF_CACHE", str(folder))
        assert digest_file_once(file) == hashlib.sha256(file.read_bytes()).hexdigest()
