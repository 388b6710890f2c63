"""Workers: processes that tokenize the blocks of a large file, one per core. The main process reads and writes.

Workers are new processes, not forks: a fork would inherit the run's threads and GPU, and Python's own pools would
import the recipe again in each of them. They read work from standard input and end when it closes.

Memory: two blocks of rows.BLOCK_BYTES (Parquet: 1000 rows) and a tokenizer per worker (Llama 3: 190 MB while it
starts, then 120 MB), and at most 260 bytes per row in the main process for index, selection and ledger. It does not
grow with the text (benchmarks/large_files.py). A JSON array is held whole.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import BinaryIO

from tune2gguf.data.rows import Block
from tune2gguf.data.tokenize import BlockTokenizer, Part

# Starting a process takes about as long as tokenizing this much.
MIN_SHARED_BYTES = 16 * 2**20
MAX_WORKERS = 16


def count_workers(num_bytes: int) -> int:
    """Return the number of workers for a file of this size; 0: the main process tokenizes it."""
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if num_bytes < MIN_SHARED_BYTES or num_cores < 2 else min(num_cores, MAX_WORKERS)


def tokenize_blocks(
    blocks: Iterable[Block], block_tokenizer: BlockTokenizer, *, num_workers: int, stop_at_problem: bool
) -> Iterator[tuple[Block, Part]]:
    """Yield each block, without its content, and its tokenized part, in order.

    At most two blocks per worker are in memory.

    Args:
        num_workers: 0: tokenize in this process, with all of the tokenizer's threads
        stop_at_problem: after a bad row, only look for more bad rows

    Raises:
        ValueError: as BlockTokenizer.tokenize, or if a worker dies
    """
    has_problem = False
    if num_workers == 0:
        for block in blocks:
            part = block_tokenizer.tokenize(block, only_check=has_problem and stop_at_problem)
            has_problem = has_problem or bool(part.index.problems)
            yield _strip(block), part
        return
    waiting: deque[tuple[Block, Future[Part]]] = deque()
    with _Workers(block_tokenizer, num_workers) as workers:
        for block in blocks:
            waiting.append((_strip(block), workers.submit(block, only_check=has_problem and stop_at_problem)))
            if len(waiting) >= 2 * num_workers:
                done, future = waiting.popleft()
                part = future.result()
                has_problem = has_problem or bool(part.index.problems)
                yield done, part
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()


def _strip(block: Block) -> Block:
    return Block(block.name, block.start, b"", block.position)


class _Workers:
    """The worker processes, each with a thread that sends it a block and waits for the answer."""

    def __init__(self, block_tokenizer: BlockTokenizer, num_workers: int) -> None:
        setup = pickle.dumps(block_tokenizer)
        # One core per worker, which imports the same package as this process.
        variables = {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", "from tune2gguf.data.workers import work; work()"]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **variables})
            for _ in range(num_workers)
        ]
        self.idle: SimpleQueue[subprocess.Popen] = SimpleQueue()
        self.threads = ThreadPoolExecutor(num_workers)
        for process in self.processes:
            self.threads.submit(self._set_up, process, setup)

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        """Kill the workers, even at work."""
        for process in self.processes:
            process.kill()
        self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # unsent data of a worker that is gone
                    pipe.close()

    def _set_up(self, process: subprocess.Popen, setup: bytes) -> None:
        with suppress(OSError):  # the worker is gone; its first block reports it
            _send(process.stdin, setup)
        self.idle.put(process)

    def submit(self, block: Block, *, only_check: bool) -> Future[Part]:
        return self.threads.submit(self._ask, block, only_check)

    def _ask(self, block: Block, only_check: bool) -> Part:
        process = self.idle.get()
        try:
            _send(process.stdin, pickle.dumps((block, only_check), protocol=5))
            answer = pickle.loads(_receive(process.stdout))
        except (OSError, EOFError):
            process.wait()
            raise ValueError(
                f"{block.name}: a tokenizing process ended with exit code {process.returncode}; "
                "did the machine run out of memory?"
            ) from None
        finally:
            self.idle.put(process)
        if isinstance(answer, Exception):
            raise answer
        return answer


def work() -> None:
    """Run a worker: tokenize blocks from standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one ends the workers
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # prints must not mix with the answers
    with suppress(EOFError, BrokenPipeError):
        block_tokenizer: BlockTokenizer = pickle.loads(_receive(source))
        _give_memory_back()
        while True:
            block, only_check = pickle.loads(_receive(source))
            try:
                answer: Part | Exception = block_tokenizer.tokenize(block, only_check=only_check)
            except Exception as error:  # raised in the main process
                answer = error
            _send(sink, pickle.dumps(answer, protocol=5))


def _give_memory_back() -> None:
    """Return freed memory to the system if the C library can: after loading the tokenizer, half of the process."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _send(pipe: BinaryIO, message: bytes) -> None:
    pipe.write(len(message).to_bytes(8, "little"))
    pipe.write(message)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes:
    size = pipe.read(8)
    message = pipe.read(int.from_bytes(size, "little"))
    if len(size) < 8 or len(message) < int.from_bytes(size, "little"):
        raise EOFError
    return message
