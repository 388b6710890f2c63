"""Atomic writes: files and folders appear whole or not at all, and leftovers are removed."""

import os
import resource
import signal
import time
from contextlib import contextmanager

import pytest

from tune2gguf.files.atomic import clear_leftovers, write_file, write_folder, write_text


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk():
    """Limit the size of files: writing fails as on a full disk. pytest may hit the limit, too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError) as caught, full_disk():
        write_text(path, "x" * 2000)
    assert caught.value.filename == str(path)
    assert list_names(tmp_path) == ["a.txt"] and path.read_text() == "old"


def test_file_that_was_not_found_keeps_its_own_name_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, write_file(tmp_path / "a.txt"):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")


@pytest.mark.parametrize("kill", [KeyboardInterrupt, ValueError])
def test_failed_replacement_leaves_the_old_folder(tmp_path, kill):
    with write_folder(tmp_path / "a") as folder:
        write_text(folder / "x", "old")
    with pytest.raises(kill), write_folder(tmp_path / "a", overwrite=True) as folder:
        write_text(folder / "x", "new")
        raise kill
    assert list_names(tmp_path) == ["a"] and (tmp_path / "a/x").read_text() == "old"


def test_replacement_holds_nothing_of_the_old_folder(tmp_path):
    for name in ("old", "new"):
        with write_folder(tmp_path / "a", overwrite=True) as folder:
            write_text(folder / name, name)
    assert list_names(tmp_path) == ["a"] and list_names(tmp_path / "a") == ["new"]


def test_folder_that_came_up_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists already and is not overwritten"), write_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
    assert list_names(tmp_path) == ["a"]


def test_only_what_was_abandoned_a_day_ago_is_removed_by_the_next_writer(tmp_path):
    for name in (".a.1.unfinished", ".a.2.unfinished", ".b.1.unfinished"):
        (tmp_path / name).mkdir()
    for name in (".a.1.unfinished", ".b.1.unfinished"):
        os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    write_text(tmp_path / "a", "")
    assert list_names(tmp_path) == [".a.2.unfinished", ".b.1.unfinished", "a"]


def test_cleared_folder_has_what_was_moved_aside_and_no_leftovers(tmp_path):
    for name in (".a.replaced", ".b.replaced", "b", ".c.1.unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / ".d.1.unfinished").write_text("half")
    clear_leftovers(tmp_path)
    assert list_names(tmp_path) == ["a", "b"]
