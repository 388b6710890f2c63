"""Several torchrun agents, as on several machines: docs/running.md's commands, on loopback and between two hosts."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, make_run_arguments
from tests.recipes.launch import count_lines, find_free_port, read_outcome
from tests.recipes.test_commands import SCRIPTS
from tests.recipes.test_resume import HARD

SECONDS_TO_START = 180  # on a busy machine two agents and two processes take long to import torch


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_base) -> list[str]:
    """Return arguments of a run that is long enough to be killed: 200 steps with two processes."""
    shared = make_run_arguments(tmp_path_factory.mktemp("nodes"), tiny_base)
    return [*shared, *HARD, "epochs=100", "save_every_n_steps=7", "scheduler=constant", "learning_rate=0.001"]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> dict:
    """Return the outcome of two processes that were never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    log = folder.with_suffix(".log")
    finish([Agent(f"127.0.0.1:{find_free_port()}", [*arguments, f"output_dir={folder}"], log, num_nodes=1)])
    return read_outcome(folder)


class Agent:
    """torchrun on one machine: one of two with a process each, or one with two processes."""

    def __init__(
        self,
        endpoint: str,
        arguments: list[str],
        log: Path,
        *,
        num_nodes: int = 2,
        max_restarts: int = 0,
        on_host: tuple[str, ...] = (),
    ) -> None:
        self.log = log
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "test"]
        nodes = ["--nnodes", str(num_nodes), "--nproc-per-node", str(2 // num_nodes)]
        command = ["torchrun", *nodes, *rendezvous, "--max-restarts", str(max_restarts)]
        environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [*on_host, *command, "recipes/lora_finetune.py", *arguments],
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

    def wait(self, timeout: float = SECONDS_TO_START) -> int:
        """Return the exit code. After the timeout, kill the agent and fail."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill(with_workers=True)
            pytest.fail(f"torchrun is still running after {timeout} s:\n{self.log.read_text()}")


def start_nodes(arguments: list[str], tmp_path: Path, *, num_nodes: int = 2, max_restarts: int = 0) -> list[Agent]:
    options = {"num_nodes": num_nodes, "max_restarts": max_restarts}
    endpoint = f"127.0.0.1:{find_free_port()}"
    return [Agent(endpoint, arguments, tmp_path / f"node-{number}.log", **options) for number in range(num_nodes)]


def wait_for_lines(path: Path, count: int, agents: list[Agent]) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while count_lines(path) < count:
        assert time.monotonic() < deadline, "\n".join(agent.log.read_text() for agent in agents)
        assert all(agent.process.poll() is None for agent in agents), "\n".join(a.log.read_text() for a in agents)
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Return whether a process is alive. A zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there after {seconds} s"
        time.sleep(0.1)


def finish(agents: list[Agent]) -> None:
    assert [agent.wait() for agent in agents] == [0] * len(agents), "\n".join(a.log.read_text() for a in agents)


def test_lost_node_ends_the_other_and_restarted_both_end_as_if_never_stopped(arguments, whole, tmp_path):
    folder = tmp_path / "run"
    arguments = [*arguments, f"output_dir={folder}", "resume=auto"]
    agents = start_nodes(arguments, tmp_path)
    wait_for_lines(folder / "metrics.jsonl", 20, agents)
    agents[1].kill(with_workers=True)
    assert agents[0].wait(timeout=30) != 0
    assert agents[0].log.read_text().count("error: another process of the run is gone") == 1
    finish(start_nodes(arguments, tmp_path))
    assert read_outcome(folder) == whole


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_agent_leaves_no_process_behind_and_all_is_saved(arguments, whole, tmp_path, killed):
    folder = tmp_path / "run"
    arguments = [*arguments, f"output_dir={folder}", "resume=auto"]
    agents = start_nodes(arguments, tmp_path)
    wait_for_lines(folder / "metrics.jsonl", 20, agents)
    orphans = agents[killed].find_workers()
    agents[killed].kill(with_workers=False)
    wait_until_gone(orphans, seconds=30)
    assert agents[1 - killed].wait(timeout=60) != 0
    said = "".join(agent.log.read_text() for agent in agents)
    assert "to go on from there" in said or "error: another process of the run is gone" in said
    finish(start_nodes(arguments, tmp_path))
    assert read_outcome(folder) == whole


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_killed_process_is_restarted_and_goes_on(arguments, whole, tmp_path, num_nodes):
    """torchrun --max-restarts with resume=auto needs nobody to restart a run."""
    folder = tmp_path / "run"
    arguments = [*arguments, f"output_dir={folder}", "resume=auto"]
    agents = start_nodes(arguments, tmp_path, num_nodes=num_nodes, max_restarts=2)
    wait_for_lines(folder / "metrics.jsonl", 20, agents)
    os.kill(agents[-1].find_workers()[-1], signal.SIGKILL)
    finish(agents)
    assert "resume: going on after step" in agents[0].log.read_text() + agents[-1].log.read_text()
    assert read_outcome(folder) == whole


def test_slurm_job_trains_and_submitted_again_goes_on(arguments, tmp_path):
    """Slurm's commands are replaced: the job has one node, this machine, and srun runs its command here."""
    programs = {"scontrol": "echo 127.0.0.1", "srun": 'shift; exec "$@"'}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-1]", "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "7"}
    job |= {"RENDEZVOUS_PORT": str(find_free_port()), "CONFIG": arguments[1], "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}{os.pathsep}{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    said = []
    for epochs in (1, 2):
        submitted = ["bash", "examples/several_nodes/slurm.sh", *arguments[2:], f"epochs={epochs}"]
        submitted.append(f"output_dir={tmp_path / 'run'}")
        done = subprocess.run(
            submitted, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=SECONDS_TO_START
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "processes: 2" in said[0] and "resume: going on after step 2" in said[1]


class Network:
    """Two hosts, node-0 and node-1, with their own names and addresses and a cable between them."""

    def __init__(self) -> None:
        self.names = [f"t2g{os.getpid()}{host}" for host in "ab"]

    def __enter__(self) -> "Network":
        a, b = self.names
        for name in self.names:
            self.ip(f"netns add {name}")
        self.ip(f"link add {a} netns {a} type veth peer name {b} netns {b}")
        for number, name in enumerate(self.names):
            self.ip(f"-n {name} addr add 10.77.0.{number + 1}/24 dev {name}")
            self.ip(f"-n {name} link set lo up")
            self.plug(number, "up")
            hosts = Path("/etc/netns", name, "hosts")  # `ip netns exec` shows this as /etc/hosts
            hosts.parent.mkdir(parents=True)
            hosts.write_text("127.0.0.1 localhost\n10.77.0.1 node-0\n10.77.0.2 node-1\n")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)

    def ip(self, command: str) -> None:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)

    def plug(self, number: int, state: str) -> None:
        """Plug a host's cable in (up) or out (down)."""
        self.ip(f"-n {self.names[number]} link set {self.names[number]} {state}")

    def run_on(self, number: int) -> tuple[str, ...]:
        """Return the prefix of a command on a host."""
        rename = f'echo node-{number} > /proc/sys/kernel/hostname && exec "$@"'
        return ("ip", "netns", "exec", self.names[number], "unshare", "--uts", "sh", "-c", rename, "sh")


@pytest.fixture
def network():
    hosts = Network()
    try:
        hosts.__enter__()
        subprocess.run([*hosts.run_on(0), "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        hosts.__exit__()
        pytest.skip(f"two hosts need Linux, root and iproute2: {error}")
    yield hosts
    hosts.__exit__()


def test_two_hosts_end_when_the_cable_is_pulled_and_go_on_as_if_it_never_was(arguments, whole, tmp_path, network):
    """No connection is closed: a process that waits for the other host would wait forever."""
    folder = tmp_path / "run"
    arguments = [*arguments, f"output_dir={folder}", "resume=auto"]

    def start() -> list[Agent]:
        logs = [tmp_path / f"node-{number}.log" for number in range(2)]
        return [Agent("node-0:29500", arguments, logs[n], on_host=network.run_on(n)) for n in range(2)]

    agents = start()
    wait_for_lines(folder / "metrics.jsonl", 20, agents)
    workers = [pid for agent in agents for pid in agent.find_workers()]
    network.plug(1, "down")
    wait_until_gone(workers, seconds=35)
    for agent in agents:
        said = agent.log.read_text()
        assert said.count("has been silent for 24 s; check its machine and the network") == 1, said
        assert 'lora_finetune.py", line' not in said, said  # torchrun's agent prints tracebacks, too
        agent.kill(with_workers=True)
    network.plug(1, "up")
    finish(start())
    assert read_outcome(folder) == whole
