"""The devices of this machine and the memory that is free on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch


@dataclass(frozen=True)
class Device:
    """A device of this machine, with the bytes that are free on it."""

    name: str  # cpu, cuda:0, mps …
    title: str
    free: int

    @property
    def kind(self) -> str:
        return self.name.partition(":")[0]


def list_devices() -> list[Device]:
    """Return the CPU and the GPUs of this machine."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return [get_device(name) for name in ("cpu", *names)]


def get_device(name: str) -> Device:
    """Return a device of this machine by name: cpu, cuda:0, cuda:1 …, mps"""
    if name == "cpu":
        return Device(name, "this machine's memory", get_free_host_memory())
    if name == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return Device(name, "this machine's GPU", max(0, free))
    free, _ = torch.cuda.mem_get_info(name)
    return Device(name, torch.cuda.get_device_name(name), free)


def measure_peak(device: torch.device) -> int:
    """Return this process's peak memory so far, in bytes: allocated by torch on a GPU, resident on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _measure_resident_peak()


def _measure_resident_peak() -> int:
    try:
        # Not getrusage, whose peak includes the parent process.
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (FileNotFoundError, StopIteration):  # not Linux
        return _ask_for_resident_peak()


def _ask_for_resident_peak() -> int:
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def get_free_host_memory() -> int:
    """Return the bytes of memory that this process has or could get, within its control group's limit."""
    free = psutil.virtual_memory().available
    return min([free, *_list_group_limits()]) + psutil.Process().memory_info().rss


def _list_group_limits() -> Iterator[int]:
    for folder, limit_name, used_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit = Path(folder, limit_name).read_text().strip()
            used = int(Path(folder, used_name).read_text())
        except FileNotFoundError:
            continue
        if limit != "max":
            yield max(0, int(limit) - used)
