"""A sweep of real runs: stopped and restarted, it repeats no finished run and resumes the others."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tune2gguf.report.compare import group_runs


def start(command: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True)


def stop_in(run_dir: Path, command: list[str], signum: signal.Signals) -> tuple[int, str, str]:
    """Start a sweep, send the signal after a run's first steps; return exit code and output."""
    process, metrics = start(command), run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signum)
    output = process.communicate(timeout=60)
    return process.returncode, *output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_stopped_sweep_goes_on_without_repeating_what_is_finished(run_arguments, tmp_path, signum):
    fixed = [one for one in run_arguments if not one.startswith(("output_dir=", "epochs="))]
    folder = tmp_path / "sweep"
    command = [sys.executable, "scripts/sweep.py", *fixed, "--out", str(folder), "epochs=10"]
    command += ["learning_rate=1e-3,2e-3,1e-9"]
    runs = [folder / f"learning_rate-{rate}" for rate in ("1e-3", "2e-3", "1e-9")]

    code, said, complaint = stop_in(runs[1], command, signum)
    assert said == "run 1 of 3: learning_rate=1e-3\nrun 2 of 3: learning_rate=2e-3\n"
    if signum == signal.SIGINT:
        assert code == 130 and complaint.startswith("stopped; ")
        assert "saved" in (folder / "learning_rate-2e-3.log").read_text()
    finished = {path: path.stat().st_mtime_ns for path in runs[0].rglob("*") if path.is_file()}

    process = start(command)
    said, complaint = process.communicate(timeout=200)
    assert process.returncode == 0, complaint
    # A killed sweep leaves its run going; the next sweep waits for that run's end.
    assert re.findall(r"^run (\d) of 3", said, re.MULTILINE) == (["2", "3"] if signum == signal.SIGINT else ["3"])
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    if signum == signal.SIGINT:
        assert "resume: going on after step" in (folder / "learning_rate-2e-3.log").read_text()

    (group,) = group_runs(runs)
    assert len(group.runs) == 3 and group.runs[-1].run_dir == runs[2]
    assert f"best: {group.runs[0].name}\nnext: python scripts/export.py" in said
    assert said.splitlines()[-1].endswith(f"/{group.runs[0].name}")
    assert (folder / "comparison.html").is_file()

    process = start(command)
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 0 and "run " not in said.split("validation rows")[0], complaint


def test_failed_run_is_said_and_the_others_are_ranked(run_arguments, tmp_path):
    fixed = [one for one in run_arguments if not one.startswith("output_dir=")]
    folder = tmp_path / "sweep"
    (folder / "max_seq_len-64").mkdir(parents=True)  # not the folder of a run
    (folder / "max_seq_len-64" / "config.yaml").write_text("{}")
    process = start([sys.executable, "scripts/sweep.py", *fixed, "--out", str(folder), "max_seq_len=64,128"])
    said, complaint = process.communicate(timeout=100)
    assert process.returncode == 0, complaint
    assert f"failed with exit code 1; see {folder}/max_seq_len-64.log" in said
    assert "error" in (folder / "max_seq_len-64.log").read_text()
    assert "best: max_seq_len-128" in said
