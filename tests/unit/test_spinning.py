"""OpenMP's threads spin long while a process has its cores for itself, and briefly beside other programs."""

import subprocess
import sys
import threading

import pytest

from tune2gguf.machine import spinning
from tune2gguf.machine.cpu import count_cores
from tune2gguf.machine.spinning import SpinWatch

ALONE, NICE, BUSY = 0.05, 0.2, 0.8


class Fed:
    """A watch that gets its shares from the test instead of the clock; its pools are real."""

    def __init__(self) -> None:
        self.watch = SpinWatch(2)
        self.watch._spin_briefly()

    def feed(self, *shares: float) -> str:
        """Return b or l, for brief or long spinning, after each share."""
        states = []
        for share in shares:
            self.watch._decide(share)
            states.append("b" if self.watch.is_brief else "l")
        return "".join(states)


def test_spinning_is_long_after_a_second_alone_and_brief_at_once_beside_a_busy_program():
    fed = Fed()
    assert fed.feed(*[ALONE] * 4, *[NICE] * 3) == "bbbl" + "lll"
    assert fed.feed(BUSY, *[BUSY] * 20, *[ALONE] * 3) == "b" + "b" * 20 + "bbl"


def test_the_sooner_long_spinning_fails_the_later_it_is_tried_again():
    """Programs that wait while threads spin briefly, and do not while they spin long."""
    fed, tries = Fed(), []
    for _ in range(8):
        looks = 1
        while fed.feed(NICE) == "b":
            looks += 1
        assert fed.feed(BUSY) == "b"
        tries.append(looks)
    assert tries == [4, 8, 16, 32, 64, 128, 256, 256]
    # Long enough alone, it is tried soon again.
    while fed.feed(ALONE) == "b":
        pass
    fed.feed(*[ALONE] * 512)
    assert fed.feed(BUSY, *[ALONE] * 4) == "bbbbl"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs GNU's OpenMP")
@pytest.mark.skipif(count_cores() < 2, reason="needs two cores")
def test_an_idle_pool_ends_the_spinning_between_two_products_and_its_end_brings_it_back():
    program = """
import time, torch
from tune2gguf.machine.spinning import SpinWatch
torch.set_num_threads(2)
x = torch.randn(240, 1536)
def measure():
    before = time.process_time()
    for _ in range(100):
        torch.nn.functional.silu(x)
        time.sleep(0.005)
    return time.process_time() - before
watch = SpinWatch(2)
long = measure()
watch._spin_briefly()
brief = measure()
watch._end_of_pools.set()
time.sleep(0.1)
print(long / brief, measure() / brief)
"""
    environment = {key: value for key, value in spinning.os.environ.items() if key not in spinning.SETTINGS}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    # CPU time of threads that wait: sixteen times as much, on a machine with idle cores.
    assert before > 2 and after > 2


@pytest.mark.parametrize(("num_threads", "name"), [(1, None), (2, "GOMP_SPINCOUNT"), (2, "OMP_WAIT_POLICY")])
def test_one_thread_and_a_users_setting_are_left_alone(monkeypatch, num_threads, name):
    for setting in spinning.SETTINGS:
        monkeypatch.delenv(setting, raising=False)
    if name is not None:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(spinning, "_watch", None)
    before = threading.active_count()
    spinning.share_cores(num_threads)
    assert spinning._watch is None and threading.active_count() == before


def test_threads_spin_briefly_where_the_system_does_not_count_their_waits(monkeypatch, tmp_path):
    (tmp_path / str(threading.get_native_id())).mkdir()
    monkeypatch.setattr(spinning, "TASKS", tmp_path)
    with pytest.raises(FileNotFoundError):
        spinning.read_waits()
    watch = SpinWatch(2)
    watch.run()  # ends
    assert watch.is_brief


def test_llama_cpps_threads_wait_in_openmps_library():
    program = "import xllamacpp; from tune2gguf.machine.spinning import find_openmp; print(find_openmp())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "libgomp" in done.stdout
    program = "import xllamacpp; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "libomp" not in maps and "libiomp" not in maps
