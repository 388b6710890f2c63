"""Several torchrun agents, as on several machines: what the README's section says, run on loopback."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.recipes.launch import count_lines, find_free_port, read_outcome
from tests.recipes.test_commands import SCRIPTS
from tests.recipes.test_resume import HARD

pytestmark = [pytest.mark.slow, pytest.mark.load_sensitive]


@pytest.fixture
def arguments(run_arguments) -> list[str]:
    """Long enough to be killed in: 200 steps."""
    return [*run_arguments, *HARD, "epochs=50", "save_every_n_steps=7", "scheduler=constant", "learning_rate=0.001"]


class Agent:
    """torchrun on one of two machines, with one process."""

    def __init__(self, port: int, arguments: list[str], log: Path, *, num_nodes: int = 2, max_restarts: int = 0):
        self.log = log
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
        nodes = ["--nnodes", str(num_nodes), "--nproc-per-node", str(2 // num_nodes)]
        command = ["torchrun", *nodes, *rendezvous, "--max-restarts", str(max_restarts)]
        environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "recipes/lora_finetune.py", *arguments],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=output,
            )

    def find_workers(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def kill(self, *, with_workers: bool) -> None:
        workers = self.find_workers() if with_workers else []
        for pid in [self.process.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


def wait_for_lines(path: Path, count: int, agents: list[Agent]) -> None:
    deadline = time.monotonic() + 120
    while count_lines(path) < count:
        assert time.monotonic() < deadline, "\n".join(agent.log.read_text() for agent in agents)
        assert all(agent.process.poll() is None for agent in agents), "\n".join(a.log.read_text() for a in agents)
        time.sleep(0.01)


def start_nodes(arguments: list[str], tmp_path: Path) -> list[Agent]:
    port = find_free_port()
    return [Agent(port, arguments, tmp_path / f"node-{number}.log") for number in range(2)]


def run_whole(arguments: list[str], tmp_path: Path) -> dict:
    for agent in start_nodes([*arguments, f"output_dir={tmp_path / 'whole'}"], tmp_path):
        assert agent.process.wait(timeout=180) == 0, agent.log.read_text()
    return read_outcome(tmp_path / "whole")


def test_lost_node_ends_the_other_and_restarted_both_end_as_if_never_stopped(arguments, tmp_path):
    folder = tmp_path / "runs/tiny"
    agents = start_nodes(arguments, tmp_path)
    wait_for_lines(folder / "metrics.jsonl", 20, agents)
    agents[1].kill(with_workers=True)
    started = time.monotonic()
    assert agents[0].process.wait(timeout=60) != 0
    assert time.monotonic() - started < 30
    assert agents[0].log.read_text().count("error: another process of the run is gone") == 1
    for agent in start_nodes([*arguments, "resume=auto"], tmp_path):
        assert agent.process.wait(timeout=180) == 0, agent.log.read_text()
    assert read_outcome(folder) == run_whole(arguments, tmp_path)


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_agent_leaves_no_process_behind_and_all_is_saved(arguments, tmp_path, killed):
    folder = tmp_path / "runs/tiny"
    agents = start_nodes(arguments, tmp_path)
    wait_for_lines(folder / "metrics.jsonl", 20, agents)
    (orphan,) = agents[killed].find_workers()
    agents[killed].kill(with_workers=False)
    assert agents[1 - killed].process.wait(timeout=60) != 0
    deadline = time.monotonic() + 30
    while Path(f"/proc/{orphan}").exists():
        assert time.monotonic() < deadline, "the killed agent's process is still there"
        time.sleep(0.1)
    said = "".join(agent.log.read_text() for agent in agents)
    assert "to go on from there" in said or "error: another process of the run is gone" in said
    for agent in start_nodes([*arguments, "resume=auto"], tmp_path):
        assert agent.process.wait(timeout=180) == 0, agent.log.read_text()
    assert read_outcome(folder) == run_whole(arguments, tmp_path)


def test_killed_process_is_restarted_and_goes_on(arguments, tmp_path):
    """torchrun --max-restarts with resume=auto: nobody has to be there."""
    folder, log = tmp_path / "runs/tiny", tmp_path / "log"
    agent = Agent(find_free_port(), [*arguments, "resume=auto"], log, num_nodes=1, max_restarts=1)
    wait_for_lines(folder / "metrics.jsonl", 20, [agent])
    os.kill(agent.find_workers()[1], signal.SIGKILL)
    assert agent.process.wait(timeout=180) == 0, log.read_text()
    assert "resume: going on after step" in log.read_text()
    assert read_outcome(folder) == run_whole(arguments, tmp_path)
