"""Starts the recipe in processes that can be killed, without importing torch in each."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

from torch.distributed import TCPStore

from tests.conftest import REPOSITORY

# Each run is forked from one process that has imported everything and done nothing else.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "recipes.lora_finetune",
        "torchtune.training",
        "tune2gguf.model.llama",
        "tune2gguf.data",
        "tune2gguf.base.load",
        "scipy.stats",
        "tune2gguf.verdict.conclude",
        "tune2gguf.report",
        "matplotlib.figure",
        "matplotlib.backends.backend_svg",
    ]
)
MEASURED = ("seconds", "tokens_per_second", "supervised_tokens_per_second", "peak_memory_bytes")


class Launch:
    """The processes of one run. `log` has their output."""

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        *,
        num_processes: int = 1,
        limits: dict[int, tuple] | None = None,
        added: dict[int, list[str]] | None = None,
    ) -> None:
        """Start them. `limits` and `added` arguments apply to single ranks."""
        self.log = log
        common = {}
        if num_processes > 1:
            common |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
            # Like torchrun's agent, this process keeps the store at which the others meet.
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            common |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        self.processes = [
            CONTEXT.Process(
                target=run_recipe,
                args=(
                    [*arguments, *(added or {}).get(rank, [])],
                    log,
                    {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    (limits or {}).get(rank),
                ),
            )
            for rank in range(num_processes)
        ]
        for process in self.processes:
            process.start()

    def signal(self, signum: int, *, rank: int | None = None) -> None:
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, signum)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Return the exit codes, negative for a signal. After the timeout, kill all processes and fail."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, f"still running after {timeout} s:\n{self.log.read_text()}"
        return [process.exitcode for process in self.processes]

    def wait_until(self, condition, timeout: float = 60.0) -> None:
        """Return when the condition holds or the run has ended."""
        deadline = time.monotonic() + timeout
        while not condition() and any(process.is_alive() for process in self.processes):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)


def run_recipe(arguments: list[str], log: Path, environment: dict[str, str], limit: tuple | None) -> None:
    """Act as the command: its arguments, output and exit code. `limit` is a resource and its limit."""
    descriptor = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    import torch

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # more processes would share all cores
    if limit is not None:
        resource.setrlimit(limit[0], (limit[1], limit[1]))
    from recipes.lora_finetune import recipe_main

    sys.argv = ["lora_finetune.py", *arguments]
    recipe_main()


def run_to_end(arguments: list[str], log: Path, **options) -> str:
    """Run, require success, return the output."""
    launch = Launch(arguments, log, **options)
    codes = launch.wait()
    assert set(codes) == {0}, log.read_text()
    return log.read_text()


def find_free_port() -> int:
    """Return an unused port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_outcome(folder: Path) -> dict:
    """Return a run's files without MEASURED values. Equal runs have equal outcomes."""
    import json

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{key: value for key, value in record.items() if key not in MEASURED} for record in records],
        **{name: (folder / name / "adapter_model.safetensors").read_bytes() for name in ("last", "best")},
        "samples": (folder / "samples.jsonl").read_text() if (folder / "samples.jsonl").exists() else "",
        "checkpoints": {path.name for path in (folder / "checkpoints").iterdir()},
    }
