"""Step checkpoints on disk: complete or absent, and never read if altered."""

import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.unit.test_atomic import full_disk
from tune2gguf.files.atomic import clear_leftovers
from tune2gguf.runs.checkpoints import (
    Checkpoint,
    CheckpointWriter,
    find_damage,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)


def make_checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        adapter={"base_model.model.x.lora_A.weight": torch.randn(4, 8, generator=generator)},
        adapter_config={"r": 4},
        state={
            "optimizer": {0: {"exp_avg": torch.randn(4, 8, generator=generator)}},
            "random": [torch.get_rng_state()],
        },
        progress={"step": step, "best_loss": 0.1 + 0.2},
    )


def test_what_is_read_is_what_was_written(tmp_path):
    written = make_checkpoint(3)
    write_checkpoint(tmp_path / "step_3", written)
    found = read_checkpoint(tmp_path / "step_3")
    assert found.progress == written.progress and found.adapter_config == written.adapter_config
    name = "base_model.model.x.lora_A.weight"
    assert torch.equal(found.adapter[name], written.adapter[name])
    assert torch.equal(found.state["optimizer"][0]["exp_avg"], written.state["optimizer"][0]["exp_avg"])
    assert torch.equal(found.state["random"][0], written.state["random"][0])


def make_large_checkpoint() -> Checkpoint:
    """Return a checkpoint with an optimizer of 32 MB."""
    return replace(make_checkpoint(1), state={"optimizer": {0: {"exp_avg": torch.zeros(8, 1024, 1024)}}})


def test_optimizer_is_written_without_a_copy_in_memory(tmp_path):
    checkpoint = make_large_checkpoint()
    tracemalloc.start()
    try:
        write_checkpoint(tmp_path / "step_1", checkpoint)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4e6
    assert torch.equal(
        read_checkpoint(tmp_path / "step_1").state["optimizer"][0]["exp_avg"], torch.zeros(8, 1024, 1024)
    )


def test_disk_that_is_full_is_named_and_leaves_nothing(tmp_path):
    checkpoint = replace(make_large_checkpoint(), adapter={})
    with pytest.raises(OSError, match="File too large") as caught, full_disk():
        write_checkpoint(tmp_path / "step_1", checkpoint)
    assert Path(caught.value.filename).name == "state.pt"
    assert list(tmp_path.iterdir()) == []


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "state.pt", "progress.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_every_damage_of_every_file_is_found(tmp_path, name, damage):
    write_checkpoint(tmp_path / "step_1", make_checkpoint(1))
    write_checkpoint(tmp_path / "step_2", make_checkpoint(2))
    assert find_damage(tmp_path / "step_2") is None
    path = tmp_path / "step_2" / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "altered":
        flip_bit(path)
    else:
        path.unlink()
    with pytest.raises(ValueError) as refused:
        read_checkpoint(tmp_path / "step_2")
    assert name in str(refused.value) and f"resume={tmp_path / 'step_1'}" in str(refused.value)


@pytest.mark.parametrize("content", [None, "", "{}", '{"files": {"state.pt": 3}}', '{"files": {}}', "\x00"])
def test_damaged_manifest_is_found(tmp_path, content):
    write_checkpoint(tmp_path / "step_1", make_checkpoint(1))
    manifest = tmp_path / "step_1/manifest.json"
    manifest.unlink() if content is None else manifest.write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json .* No other checkpoint of this run is good"):
        read_checkpoint(tmp_path / "step_1")


class Intruder:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_state_file_does_not_run(tmp_path):
    """The manifest matches the malicious file."""
    write_checkpoint(tmp_path / "step_1", Checkpoint({}, {}, {"x": Intruder(tmp_path / "ran")}, {}))
    assert find_damage(tmp_path / "step_1") is None
    with pytest.raises(pickle.UnpicklingError):
        read_checkpoint(tmp_path / "step_1")
    assert not (tmp_path / "ran").exists()


def test_the_newest_are_kept_and_a_step_is_written_once(tmp_path):
    writer = CheckpointWriter(tmp_path, keep_last=2)
    for step in (1, 2, 3, 9, 10, 10):
        writer.start(step, make_checkpoint(step))
    writer.wait()
    writer.close()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == ["step_9", "step_10"]
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path / "checkpoints"))
    assert writer.newest.name == "step_10"


def test_what_a_killed_write_left_is_no_checkpoint_and_is_removed(tmp_path):
    write_checkpoint(tmp_path / "step_1", make_checkpoint(1))
    for name in (".step_2.x1.unfinished", ".step_0.removed.unfinished"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_1"]
    clear_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_error_of_the_writing_thread_reaches_the_run(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path, keep_last=2)
    writer.start(1, make_checkpoint(1))
    with pytest.raises(OSError):
        writer.wait()
    writer.close()
