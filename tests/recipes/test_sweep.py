"""A sweep of real runs: killed and started again, it repeats nothing that was finished, and stops what is hopeless."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY
from tests.recipes.test_commands import SCRIPTS
from tune2gguf.report.compare import group_runs

RATES = ("1e-3", "1.1e-3", "1.2e-3", "1.3e-3", "1e-9")


@pytest.mark.slow
def test_killed_sweep_goes_on_and_stops_the_hopeless_trial(run_arguments, tmp_path):
    fixed = [one for one in run_arguments if not one.startswith(("output_dir=", "resume="))]
    folder = tmp_path / "sweep"
    command = [sys.executable, "scripts/sweep.py", *fixed, "epochs=30"]
    command += ["--out", str(folder), f"learning_rate={','.join(RATES)}"]
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    first = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    interrupted = folder / "trial-001/metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (interrupted.exists() and interrupted.stat().st_size > 0):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    assert "trial 000, 1 of 5: learning_rate=1e-3" in first.communicate()[0]
    finished = {path: path.stat().st_mtime_ns for path in (folder / "trial-000").rglob("*") if path.is_file()}

    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "trial 001 was interrupted; it goes on where it stopped" in done.stdout
    assert re.findall(r"^trial (\d+), \d of 5", done.stdout, re.MULTILINE) == ["001", "002", "003", "004"]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert "half of the trials were better by then" in done.stdout
    assert not (folder / "trial-004/last").exists()

    (group,) = group_runs([folder / f"trial-{number:03}" for number in range(5)])
    assert group.runs[-1].name == "trial-004"
    assert done.stdout.splitlines()[-1].endswith(f"{group.runs[0].name}")
    assert "next: python scripts/export.py" in done.stdout
    assert (folder / "comparison.html").is_file()

    again = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "trial 0" not in again.stdout
