"""Settings of a run on a CPU: threads per process, their spinning, and an allocator that keeps freed memory."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

from tune2gguf.machine.spinning import share_cores

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = -1
MAX_THREADS = 512  # llama.cpp aborts the process above its GGML_MAX_N_THREADS
GROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def prepare_cpu(num_processes: int) -> None:
    """Set threads, their spinning and the allocator of this process, one of `num_processes` on this machine."""
    import torch

    num_threads = choose_num_threads(num_processes)
    torch.set_num_threads(num_threads)
    share_cores(num_threads)
    keep_freed_memory()


def choose_num_threads(num_processes: int) -> int:
    """Return the threads of each process: an equal share of the cores, at least one.

    OMP_NUM_THREADS takes precedence, except for the 1 that torchrun sets by default. A single process keeps torch's
    choice, up to the cores that it may use.
    """
    import torch

    said = os.environ.get("OMP_NUM_THREADS")
    if said is not None and not (said == "1" and num_processes > 1 and "TORCHELASTIC_RUN_ID" in os.environ):
        return torch.get_num_threads()
    if num_processes == 1:
        return min(torch.get_num_threads(), count_cores())
    return max(1, count_cores() // num_processes)


def check_num_threads(num_threads: int | None) -> None:
    """Raise ValueError if a number of threads is out of range; None leaves the choice to the program."""
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"--threads must be at least 1, got {num_threads}")
    if num_threads is not None and num_threads > MAX_THREADS:
        raise ValueError(f"--threads must be at most {MAX_THREADS}, got {num_threads}")


def count_cores() -> int:
    """Return the number of physical cores that this process may use, within its control group's quota."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    try:
        cores = len({Path(_TOPOLOGY.format(cpu)).read_text() for cpu in cpus})
    except OSError:
        cores = len(cpus)
    return max(1, min(cores, _read_quota(GROUP_QUOTA)))


def _read_quota(path: Path) -> int:
    """Return the cores of a control group's quota, rounded up; without a quota, more than any machine has."""
    try:
        quota, period = path.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no quota is written as "max"
        return 1 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that a step frees for the next one; return whether it does.

    By default glibc returns large blocks to the system and gets them back as zeroed pages: a tenth of a step's time.
    The peak does not change, because the next step needs as much.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def describe_cpu() -> str:
    """Return the log line about the CPU: threads, cores, and how bf16 is computed."""
    import torch

    return f"CPU: {torch.get_num_threads()} threads per process, {count_cores()} cores, bf16 {_describe_bf16()}"


def _describe_bf16() -> str:
    import torch

    if torch.cpu._is_amx_tile_supported():
        return "by AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "by AVX512"
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "by oneDNN"
    return "emulated; dtype=fp32 base_weights=fp32 is faster here, but needs twice the memory"
