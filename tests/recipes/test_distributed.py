"""Several processes are one run: the same steps, the same end, whether they replicate the model or shard it."""

import json
import signal
from pathlib import Path

import pytest

from tests.conftest import TINY_TIED, write_tiny_base
from tests.recipes.launch import Launch, count_lines, read_outcome, run_to_end
from tests.recipes.test_resume import HARD
from tests.recipes.test_training import measure_difference, read_records


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory) -> Path:
    """A base whose layers are wide enough for 4-bit blocks to be split over two processes."""
    from tune2gguf.architectures import Architecture

    wide = Architecture(**{**vars(TINY_TIED), "embed_dim": 256, "intermediate_dim": 256, "head_dim": 64})
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "wide", wide)


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
def test_shard_equals_replicate(run_arguments, wide_base, tmp_path, base):
    precision = {"fp32": ["dtype=fp32", "base_weights=fp32"], "bf16": ["dtype=bf16", "base_weights=bf16"]}
    precision["nf4"] = ["dtype=fp32", "base_weights=nf4"]
    arguments = [*run_arguments, *precision[base], f"base_dir={wide_base}", "batch_size=2", "learning_rate=0.01"]
    arguments += ["gradient_accumulation_steps=2"]
    for parallel in ("replicate", "shard"):
        folder = tmp_path / parallel
        run_to_end(
            [*arguments, f"output_dir={folder}", f"parallel={parallel}"], tmp_path / f"{parallel}.log", num_processes=2
        )
        newest = max((folder / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
        assert json.loads((newest / "progress.json").read_text())["run"]["parallel"] == parallel
    assert measure_difference(tmp_path / "replicate", tmp_path / "shard") < 1e-5
    for key in ("loss", "val_loss", "grad_norm"):
        found = [[record.get(key) for record in read_records(tmp_path / name, key)] for name in ("replicate", "shard")]
        assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_two_processes_killed_and_resumed_equal_never_stopped(run_arguments, tmp_path, parallel):
    """With dropout, each process draws its own masks and gets its own random numbers back; one of them is killed."""
    arguments = [*run_arguments, *HARD, "save_every_n_steps=1", f"parallel={parallel}", "batch_size=1"]
    run_to_end([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path / "whole.log", num_processes=2)
    arguments += [f"output_dir={tmp_path / 'killed'}", "resume=auto"]
    metrics, log = tmp_path / "killed/metrics.jsonl", tmp_path / "killed.log"
    for rank, lines in ((1, 3), (0, 8)):
        launch = Launch(arguments, log, num_processes=2)
        launch.wait_until(lambda lines=lines: count_lines(metrics) >= lines)
        launch.signal(signal.SIGKILL, rank=rank)
        codes = launch.wait(timeout=30)
        assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, log.read_text()
    assert log.read_text().count("error: another process of the run is gone") == 2
    assert "Traceback" not in log.read_text()
    run_to_end(arguments, log, num_processes=2)
    assert read_outcome(tmp_path / "killed") == read_outcome(tmp_path / "whole")
