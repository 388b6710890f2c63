import os
import subprocess
import sys

import pytest
import torch

from tune2gguf.machine import cpu
from tune2gguf.machine.cpu import choose_num_threads, count_cores, describe_cpu


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(cpu, "count_cores", lambda: 8)


@pytest.mark.parametrize(("num_processes", "threads"), [(2, 4), (3, 2), (8, 1), (16, 1)])
def test_processes_share_the_cores_and_each_has_one_at_least(num_processes, threads):
    assert choose_num_threads(num_processes) == threads


def test_one_process_keeps_torchs_own_choice_where_it_has_as_many_cores(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert choose_num_threads(1) == 6
    monkeypatch.setattr(cpu, "count_cores", lambda: 2)
    assert choose_num_threads(1) == 2


def test_what_the_user_says_stays_but_torchruns_1_is_nobodys_word(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(os.environ["OMP_NUM_THREADS"]))
    for said in ("1", "3"):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert choose_num_threads(2) == choose_num_threads(1) == int(said)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "my-run")
    assert choose_num_threads(2) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert choose_num_threads(2) == 4
    assert choose_num_threads(1) == 1


@pytest.mark.parametrize(("text", "cores"), [("150000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", 1 << 20)])
def test_a_control_groups_quota_is_rounded_up(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu._read_quota(tmp_path / "cpu.max") == cores
    assert cpu._read_quota(tmp_path / "absent") == 1 << 20


def test_cores_are_no_more_than_the_hardware_threads_of_this_process():
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))


def test_the_log_says_threads_cores_and_how_bf16_is_computed():
    assert describe_cpu().startswith(f"CPU: {torch.get_num_threads()} threads per process, 8 cores, bf16 ")


@pytest.mark.slow
def test_a_step_gets_most_of_its_memory_from_the_step_before_it():
    program = """
import resource, sys, torch
from tune2gguf.machine.cpu import keep_freed_memory

assert sys.argv[1] == "default" or keep_freed_memory()

def take_step():  # with blocks of 64 MiB: up to 32 MiB it is chance whether the default keeps them
    x = torch.ones(1 << 24)
    for _ in range(2):
        x = x * 2 + 1

for _ in range(5):
    take_step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    take_step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def count_page_faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", program, mode], check=True, capture_output=True).stdout)

    default = count_page_faults("default")
    assert default > 100, "negative control: 16 384 pages a block, or 32 huge ones"
    # A kept heap may still grow by a block now and then.
    assert count_page_faults("kept") < 0.25 * default
