"""Preparing a large file, compared with `datasets.map` for the same work: time, CPU time, memory.

    python benchmarks/large_files.py --rows 1000000 --out benchmarks/results/large_files_cpu.txt

The rows are conversations of about 200 tokens from make_rows.py; the tokenizer is Llama 3's. Ours is `chat_dataset`: it
reads, checks each row, tokenizes, splits, compares the rows and writes the ledger. The other side is
`load_dataset("json", …).map(…, batched=True, num_proc=cores)`: it makes input_ids and labels with the same rendering
and tokenizer, and checks nothing. Both run first without a cache, then with it. Each run is a process of its own.
Memory is the sampled peak of the proportional set size of all its processes, without mapped files.
"""

import argparse
import gzip
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from make_rows import make_row

from tune2gguf.base.pypi import LLAMA3_TOKENIZER, fetch_pypi_file

NUM_TEMPLATES = 10_000
TOKENS_A_ROW = (140, 260)
SAMPLE_SECONDS = 0.5

OURS = """
import sys
from tune2gguf.data import chat_dataset
from tune2gguf.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[2], chat_template="llama3")
data = chat_dataset(sys.argv[1], tokenizer=tokenizer, max_seq_len=2048, seed=42, validation_split=0.01)
print(len(data.train) + len(data.validation), data.ledger["training"]["tokens"] + data.ledger["validation"]["tokens"])
"""
THEIRS = """
import os, sys
import numpy as np
from datasets import load_dataset
from tune2gguf.tokenizer import load_tokenizer
from tune2gguf.tokenizer.conversation import Message
os.environ["TOKENIZERS_PARALLELISM"] = "false"
tokenizer = load_tokenizer(sys.argv[2], chat_template="llama3")
def tokenize(batch):
    rows = [[Message(turn["role"], turn["content"]) for turn in turns] for turns in batch["messages"]]
    encoded = tokenizer.encode_segments([tokenizer.render_conversation(row) for row in rows])
    return {
        "input_ids": [ids for ids, _ in encoded],
        "labels": [np.where(supervised, ids, -100) for ids, supervised in encoded],
    }
kind = "parquet" if sys.argv[1].endswith(".parquet") else "json"
data = load_dataset(kind, data_files=sys.argv[1], split="train")
data = data.map(tokenize, batched=True, num_proc=len(os.sched_getaffinity(0)), remove_columns=data.column_names)
split = data.train_test_split(test_size=0.01, seed=42)
lengths = sum(map(len, (row for batch in data.with_format("arrow").iter(10_000) for row in batch["labels"])))
print(len(split["train"]) + len(split["test"]), lengths)
"""

# Memory of the reading process without the rows' text: index, selection and ledger of random rows.
INDEX = """
import sys, time
import numpy as np
from tune2gguf.data.columns import RowReader
from tune2gguf.data.ledger import make_ledger
from tune2gguf.data.select import Limits, Role, Share, select_rows
from tune2gguf.data.sources import DataSource
from tune2gguf.data.tokenize import TOKEN_DTYPE, TokenIndex, TokenizedFile, TokenizedRows, join_indices
num_rows, block, generator = int(sys.argv[1]), 1250, np.random.default_rng(0)
measure = lambda: next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is that of the imports
before, started = measure(), time.process_time()
parts = [
    TokenIndex(
        offsets=np.arange(block + 1) * 200, lines=np.arange(block) + start + 1, num_supervised=np.full(block, 100),
        first_supervised=np.full(block, 50), digests=generator.integers(0, 256, (block, 16), dtype=np.uint8),
        problems=[], num_characters=1, num_text_tokens=1, role_counts={"user": block}, unit="line",
        lines_that_spell_special=[], format="openai", absent_columns={}, num_ended=0, unused_keys={},
        num_stripped=0, has_tools=np.zeros(block, bool), lines_written_otherwise=[],
        system_prompts=[None], system_numbers=np.zeros(block, np.int64),
    )
    for start in range(0, num_rows, block)
]
file = TokenizedFile("x", RowReader(), np.empty(0, TOKEN_DTYPE), np.empty(0, bool), join_indices(parts))
del parts
roles = [Role(0, False, 0.01)]
selection = select_rows([file], roles, [Share()], seed=42, limits=Limits(2048, "truncate"))
train, validation = (TokenizedRows([file], picks, 2048) for picks in (selection.train, selection.validation))
source = DataSource(["x"], [], 0.01, RowReader(), Share())
make_ledger([file], roles, [source], selection, train=train, validation=validation)
print(measure() - before, time.process_time() - started)
"""
INDEX_ROWS = 1_000_000


@dataclass(frozen=True)
class Run:
    """Cost of a process; times in seconds, memory in MB."""

    wall: float
    cpu: float  # with its child processes
    peak: float
    rows: int
    tokens: int


def write_files(folder: Path, num_rows: int, tokenizer) -> dict[str, Path]:
    """Write the same rows as JSONL, gzip and Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tune2gguf.tokenizer.conversation import Message

    generator, templates = random.Random(0), []
    while len(templates) < min(NUM_TEMPLATES, num_rows):
        messages = make_row(generator)["messages"]
        ids, _ = tokenizer.encode_conversation([Message(**one) for one in messages])
        if TOKENS_A_ROW[0] <= len(ids) <= TOKENS_A_ROW[1]:
            templates.append(messages)
    plain, packed, table = (folder / f"rows.{suffix}" for suffix in ("jsonl", "jsonl.gz", "parquet"))
    writer = None
    with plain.open("w", encoding="utf-8") as file:
        for start in range(0, num_rows, NUM_TEMPLATES):
            rows = []
            for number in range(start, min(start + NUM_TEMPLATES, num_rows)):
                messages = [dict(one) for one in templates[number % NUM_TEMPLATES]]
                messages[-1]["content"] += f" ({number})"
                rows.append({"messages": messages})
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            batch = pa.Table.from_pylist(rows)
            writer = writer or pq.ParquetWriter(table, batch.schema)
            writer.write_table(batch)
    writer.close()
    with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=3) as file:
        shutil.copyfileobj(source, file, 2**20)
    return {"JSONL": plain, "gzip": packed, "Parquet": table}


def measure(program: str, path: Path, base_dir: Path, cache: Path) -> Run:
    variables = {"TUNE2GGUF_CACHE": str(cache), "HF_HOME": str(cache / "hf"), "HF_DATASETS_CACHE": str(cache / "hf")}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path), str(base_dir)],
        env={**os.environ, **variables, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    watch = _Watch(process.pid)
    output = process.communicate()[0]
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = watch.stop()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode} for {path}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows, tokens = map(int, output.split())
    return Run(wall, cpu, peak, rows, tokens)


def measure_index() -> str:
    command = [sys.executable, "-c", INDEX, str(INDEX_ROWS)]
    memory, seconds = map(float, subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split())
    return (
        f"index, selection and ledger of {INDEX_ROWS} rows, whatever their text: {memory:.0f} MB at the peak, "
        f"{memory * 1e6 / INDEX_ROWS:.0f} bytes a row, {seconds:.1f} CPU-s"
    )


class _Watch:
    """Samples the memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self.pid, self.peak, self.is_over = pid, 0.0, threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()

    def stop(self) -> float:
        self.is_over.set()
        self.thread.join()
        return self.peak / 1e6

    def _sample(self) -> None:
        while not self.is_over.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(map(_measure_held, _list_tree(self.pid))))


def _list_tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        for children in Path(f"/proc/{one}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue
    return found


def _measure_held(pid: int) -> float:
    """Return the process's anonymous and shared memory in bytes, shared pages divided by their users."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0.0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("Pss_Anon", 0) + sizes.get("Pss_Shmem", 0)


def format_runs(name: str, runs: dict[str, Run]) -> list[str]:
    lines = []
    for what in ("cold", "warm"):
        ours, theirs = runs[f"ours {what}"], runs[f"datasets.map {what}"]
        for who, run in (("this package", ours), ("datasets.map", theirs)):
            lines.append(
                f"{name:<8} {what:<5} {who:<13} {run.wall:8.1f} s {run.cpu:8.1f} CPU-s {run.peak:7.0f} MB"
                f"   {run.rows / run.wall:9.0f} rows/s"
            )
        lines.append(
            f"{'':<14} time {ours.wall / theirs.wall:.2f}, CPU time {ours.cpu / theirs.cpu:.2f}, "
            f"memory {ours.peak / theirs.peak:.2f} of datasets.map's"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Large files beside datasets.map.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="+", default=["JSONL", "gzip", "Parquet"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from tune2gguf.tokenizer import load_tokenizer

    base_dir = fetch_pypi_file(LLAMA3_TOKENIZER).parent
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = write_files(folder, arguments.rows, load_tokenizer(base_dir, chat_template="llama3"))
        load = os.getloadavg()[0]
        lines = [
            f"{date.today()}, {platform.machine()}, {len(os.sched_getaffinity(0))} cores, load {load:.1f} at the start"
            f", python {platform.python_version()}, tokenizers {version('tokenizers')}, datasets {version('datasets')}",
            f"{arguments.rows} rows; JSONL {files['JSONL'].stat().st_size / 1e6:.0f} MB",
            measure_index(),
        ]
        for name in arguments.formats:
            runs = {}
            for who, program in (("ours", OURS), ("datasets.map", THEIRS)):
                cache = folder / f"cache-{who}"
                for what in ("cold", "warm"):
                    runs[f"{who} {what}"] = measure(program, files[name], base_dir, cache)
                shutil.rmtree(cache)
            counts = {(run.rows, run.tokens) for run in runs.values()}
            if len(counts) > 1:
                raise RuntimeError(f"rows and tokens differ between the sides: {counts}")
            rows, tokens = counts.pop()
            lines += ["", f"{name}: {tokens / rows:.0f} tokens a row", *format_runs(name, runs)]
            print("\n".join(lines[-8:]), flush=True)
            arguments.out.parent.mkdir(exist_ok=True)
            arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
