"""Scaling over the GPUs of a machine: speed, losses, start, checkpoints and memory on 1, 2, 4 and 8 GPUs.

    python scripts/make_random_base.py --model llama3_1_8b --out /dev/shm/8b --device cuda
    python benchmarks/gpus.py --base /dev/shm/8b --out benchmarks/results/gpus.txt       # on all GPUs of the machine
    python benchmarks/gpus.py --base /dev/shm/8b --only packs --counts 1 2               # a part of it

packs  a case of benchmarks/gpu.py per GPU, 8B: lora 2 x 4096, qlora 2 x 2048 with checkpointing. `shard by NCCL`
       gathers as across machines. `stock` shards like torchtune's lora_finetune_distributed, compiled.
rows   `tune run recipes/lora_finetune.py` with the shipped 8B config on conversations of real length (make_rows.py),
       8 rows per GPU and step. No dropout, because its masks differ between GPUs; a constant learning rate, because
       runs of other lengths must have the same losses. `stock` is torchtune's lora_finetune_distributed with these
       values on the same rows. Tokens/s: tokens of an average step over the median seconds of a step, in the last two
       thirds of the steps. `worst loss`: largest relative difference of the first losses to those of one GPU with the
       same rows per step. `saved`: seconds for which a checkpoint stops the training, and until it is whole. Every run
       starts without compiled kernels.

Efficiency is tokens/s on N GPUs over N times tokens/s on one, both from this run. Cases of few GPUs run side by side.
Peak and estimate are GiB per GPU, without CUDA's own memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gpu
import gpu_user
from make_rows import make_row

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = "configs/llama3_1_8b/lora.yaml"
LORA = {"model": "8b", "kind": "lora", "batch": 2, "seq": 4096, "checkpointing": False, "rows": "packs"}
QLORA = LORA | {"kind": "qlora", "seq": 2048, "checkpointing": True}
ROWS_PER_GPU = 8  # and step
NUM_STEPS, COMPARED_STEPS, STOCK_STEPS = 60, 8, 15
SAVED_EVERY = 20
SECONDS_BETWEEN_LOOKS = 0.002


@dataclass(frozen=True)
class Job:
    """A case. `run` takes the environment with its GPUs."""

    part: str  # packs | rows
    case: str
    side: str
    num_gpus: int
    run: Callable[[dict[str, str]], dict | str]


def run_case(arguments) -> None:
    """Train a few steps as one of several processes. Rank 0 prints the result of all."""
    from tune2gguf.distributed.parallel import sum_gradients
    from tune2gguf.distributed.world import start_world, stop_world, wait_for_all

    world = start_world("cuda")
    if arguments.side == "ours":
        connected = dataclasses.replace(world, local_size=1) if arguments.across else world
        make = partial(gpu.make_ours, world=connected)
        result = gpu.measure(arguments, make, str(world.device), reduce=partial(sum_gradients, world=world))
    else:
        result = gpu.measure(arguments, make_stock_sharded, str(world.device))
    result["tokens_per_second"] *= world.size
    if world.is_main:
        print("RESULT " + json.dumps(result), flush=True)
    wait_for_all()
    stop_world()


def make_stock_sharded(arguments, device: str):
    """Make stock torchtune with random weights, sharded like in its distributed recipe."""
    import torch
    from torchtune import training
    from torchtune.models import llama3_1
    from torchtune.modules.attention_utils import packed_block_causal_mask
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    with training.set_default_dtype(torch.bfloat16), torch.device("meta"):
        model = llama3_1.lora_llama3_1_8b(
            lora_attn_modules=gpu.ATTENTION,
            apply_lora_to_mlp=True,
            lora_rank=gpu.RANK,
            lora_alpha=gpu.ALPHA,
            lora_dropout=arguments.dropout,
        )
    set_trainable_params(model, get_adapter_params(model))
    loss_module = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_module.num_output_chunks)
    training.compile_model(model, verbose=False)
    loss_module = training.compile_loss(loss_module, verbose=False)
    conditions = [partial(training.get_shard_conditions, names_to_match=None)]
    training.shard_model(model, conditions, cpu_offload=False, reshard_after_forward=True)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local = parameter.to_local()
            local.fill_(1.0) if "scale" in name else local.normal_(std=0.02)
    with training.set_default_dtype(torch.bfloat16), torch.device(device):
        for module in model.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    tokens, labels, input_pos, row_lengths = gpu.make_pack(
        model.tok_embeddings.num_embeddings, arguments.batch, arguments.seq, device
    )
    mask = packed_block_causal_mask(row_lengths)
    ignored = torch.full((arguments.batch, 1), loss_module.ignore_index, device=device)
    shifted = torch.hstack((labels[:, 1:], ignored))
    return model, lambda: loss_module(model(tokens, mask=mask, input_pos=input_pos), shifted), None


def run_packs(environment: dict[str, str], *, case: dict, timeout: int) -> dict | str:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", str(case["num_gpus"]), __file__, "--case", json.dumps(case)]
    with_path = ["env", *(f"{key}={value}" for key, value in environment.items())]
    return gpu.run_in_process([*with_path, *launch], timeout)


def list_pack_jobs(counts: list[int], *, steps: int, timeout: int) -> Iterator[Job]:
    shared = {"steps": steps, "dropout": 0.0, "device": "cuda", "side": "ours", "compile": False, "across": False}
    for count in counts:
        for kind in (LORA, QLORA):
            label = f"8b {kind['kind']} {kind['batch']}x{kind['seq']}"
            for parallel in ("alone",) if count == 1 else ("replicate", "shard"):
                case = shared | kind | {"num_gpus": count, "parallel": parallel}
                yield Job("packs", label, parallel, count, partial(run_packs, case=case, timeout=timeout))
    for count in counts:
        if count > 1:
            label = f"8b lora {LORA['batch']}x{LORA['seq']}"
            case = shared | LORA | {"num_gpus": count, "parallel": "shard"}
            by_nccl = case | {"across": True}
            yield Job("packs", label, "shard by NCCL", count, partial(run_packs, case=by_nccl, timeout=timeout))
            stock = case | {"side": "stock", "compile": True}
            yield Job("packs", label, "stock", count, partial(run_packs, case=stock, timeout=timeout))


def write_rows(path: Path, count: int) -> Path:
    generator = random.Random(0)
    path.write_text("".join(json.dumps(make_row(generator, max_exchanges=1)) + "\n" for _ in range(count)))
    return path


def launch_tune(num_gpus: int, recipe: str, config: str, options: dict) -> list[str]:
    several = ["--nproc_per_node", str(num_gpus)] if num_gpus > 1 else []
    return ["tune", "run", *several, recipe, "--config", config, *(f"{key}={value}" for key, value in options.items())]


def follow(
    command: list[str], log: Path, out: Path, *, cwd: Path, environment: dict, timeout: int, stop_at: int, mark: Path
) -> tuple[list[float], float | None] | str:
    """Run a command until its log has `stop_at` lines; return the times of the lines and of `mark`.

    Times are seconds since the start. A failure is returned as text.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    output, started, moments, marked = out.with_suffix(".output.txt"), time.perf_counter(), [], None
    path = os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment | {"PYTHONPATH": path}
        )
    while process.poll() is None and len(moments) < stop_at and time.perf_counter() - started < timeout:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        lines = log.read_bytes().count(b"\n") if log.exists() else 0
        moments += [time.perf_counter() - started] * (lines - len(moments))
        if marked is None and mark.exists():
            marked = time.perf_counter() - started
    if len(moments) >= stop_at:
        process.terminate()
    elif process.poll() is None:
        process.kill()
        return f"stopped after {timeout} s"
    if process.wait() and len(moments) < stop_at:
        return "failed: " + " | ".join(output.read_text().strip().splitlines()[-3:])
    return moments, marked


def run_ours(
    environment: dict,
    *,
    num_gpus: int,
    rows_per_gpu: int,
    steps: int,
    parallel: str,
    base: Path,
    rows: Path,
    timeout: int,
) -> dict | str:
    out = rows.parent / f"ours-{num_gpus}-{parallel}-{rows_per_gpu}"
    options = {
        "base_dir": base,
        "dataset.files": f"[{rows}]",
        "dataset.validation_split": "null",
        "lora_dropout": 0.0,
        "scheduler": "constant",
        "warmup_steps": 0,
        "gradient_accumulation_steps": rows_per_gpu // 2,
        "epochs": 1,
        "max_steps_per_epoch": steps,
        "num_samples": 0,
        "save_every_n_steps": SAVED_EVERY,
        "parallel": parallel,
        "output_dir": out,
    }
    command, log = launch_tune(num_gpus, "recipes/lora_finetune.py", CONFIG, options), out / "metrics.jsonl"
    found = follow(
        command,
        log,
        out,
        cwd=REPOSITORY,
        environment=environment | {"TRITON_CACHE_DIR": str(out.with_suffix(".kernels"))},
        timeout=timeout,
        stop_at=steps + 1,  # never
        mark=out / f"checkpoints/step_{SAVED_EVERY}",
    )
    return found if isinstance(found, str) else describe_run(out, *found)


def describe_run(out: Path, moments: list[float], whole: float | None) -> dict:
    lines = zip(moments, map(json.loads, (out / "metrics.jsonl").read_text().splitlines()), strict=False)
    moments, records = zip(*[(moment, record) for moment, record in lines if "loss" in record], strict=True)
    timed = records[len(records) // 3 :]
    result = {
        "tokens_per_second": round(
            statistics.mean(record["tokens"] for record in timed)
            / statistics.median(record["seconds"] for record in timed)
        ),
        "tokens_per_step": round(statistics.mean(record["tokens"] for record in timed)),
        "first_step_s": round(moments[0], 1),
        "peak_gib": round(max(record["peak_memory_bytes"] for record in timed) / 2**30, 2),
        "losses": [record["loss"] for record in records[:COMPARED_STEPS]],
    }
    said = re.search(r"memory: about ([\d.]+) GB .*program ([\d.]+)\)", out.with_suffix(".output.txt").read_text())
    result["estimated_gib"] = round((float(said[1]) - float(said[2])) * 1e9 / 2**30, 2)
    if len(records) > SAVED_EVERY:
        stopped = moments[SAVED_EVERY] - moments[SAVED_EVERY - 1] - records[SAVED_EVERY]["seconds"]
        result["saved_s"] = [round(stopped, 2), whole and round(whole - moments[SAVED_EVERY - 1], 2)]
    return result


def run_stock(environment: dict, *, num_gpus: int, base: Path, rows: Path, timeout: int) -> dict | str:
    out = rows.parent / f"stock-{num_gpus}"
    options = gpu_user.list_stock_options(base, rows, out)
    options |= {"tokenizer.max_seq_len": gpu_user.MAX_SEQ_LEN, "max_steps_per_epoch": STOCK_STEPS + 5}
    command = launch_tune(num_gpus, "lora_finetune_distributed", "llama3_1/8B_lora", options)
    # Not from the repository's root: there `tune` finds our recipes first.
    found = follow(
        command,
        out / "logs/log.txt",
        out,
        cwd=rows.parent,
        environment=environment,
        timeout=timeout,
        stop_at=STOCK_STEPS,
        mark=out / "none",
    )
    if isinstance(found, str):
        return found
    moments, _ = found
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    return {"step_s": round(statistics.median(gaps[len(gaps) // 3 :]), 3), "first_step_s": round(moments[0], 1)}


def list_row_jobs(counts: list[int], *, base: Path, rows: Path, timeout: int) -> Iterator[Job]:
    case, shared = "8b lora rows", {"base": base, "rows": rows, "timeout": timeout}
    if 1 in counts:
        run = partial(run_ours, num_gpus=1, rows_per_gpu=ROWS_PER_GPU, steps=NUM_STEPS, parallel="auto", **shared)
        yield Job("rows", case, "alone", 1, run)
        for count in counts[1:]:
            rows_per_gpu = ROWS_PER_GPU * count
            run = partial(
                run_ours, num_gpus=1, rows_per_gpu=rows_per_gpu, steps=COMPARED_STEPS, parallel="auto", **shared
            )
            yield Job("rows", case, f"alone, {rows_per_gpu} rows a step", 1, run)
    for count in filter(lambda count: count > 1, counts):
        for parallel in ("replicate", "shard"):
            run = partial(
                run_ours, num_gpus=count, rows_per_gpu=ROWS_PER_GPU, steps=NUM_STEPS, parallel=parallel, **shared
            )
            yield Job("rows", case, parallel, count, run)
    for count in filter(lambda count: count > 1, counts):
        yield Job("rows", case, "stock", count, partial(run_stock, num_gpus=count, **shared))


def run_jobs(jobs: list[Job], *, num_gpus: int, deadline: float) -> Iterator[tuple[Job, dict | str]]:
    """Run jobs in order, side by side if enough GPUs are free; yield each when it ends."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(num_gpus)))).split(",")
    free, waiting, running = list(range(num_gpus)), list(jobs), {}
    with ThreadPoolExecutor(max_workers=num_gpus) as threads:
        while waiting or running:
            while waiting and time.perf_counter() > deadline:
                yield waiting.pop(0), "not run: no time left"
            while waiting and waiting[0].num_gpus <= len(free):
                job = waiting.pop(0)
                mine = [free.pop(0) for _ in range(job.num_gpus)]
                environment = {"CUDA_VISIBLE_DEVICES": ",".join(visible[one] for one in mine)}
                running[threads.submit(job.run, environment)] = job, mine
            done: set[Future] = wait(running, return_when=FIRST_COMPLETED).done if running else set()
            for future in done:
                job, mine = running.pop(future)
                free = sorted([*free, *mine])
                # A failed case must not stop the others.
                error = future.exception()
                yield job, future.result() if error is None else f"failed: {error!r}"


def compare(results: dict[tuple[str, str, int], dict]) -> list[str]:
    """Return the table: each case on several GPUs, relative to one GPU and to the stock recipe."""
    head = f"{'case':<16}{'':<15}{'GPUs':>4}{'tokens/s':>10}{'effic.':>8}{'x stock':>9}{'worst loss':>12}"
    lines = ["", head + f"{'peak':>8}{'estim.':>8}{'step 1':>8}{'saved':>14}"]
    for (case, side, count), found in results.items():
        if "tokens_per_second" not in found or side.startswith("alone,"):
            continue
        speed, alone = found["tokens_per_second"], results.get((case, "alone", 1))
        stock = results.get((case, "stock", count), {})
        if "step_s" in stock:
            stock = {"tokens_per_second": found["tokens_per_step"] / stock["step_s"]}
        # Every rank draws its packs from one seed, so one GPU has the same packs; rows are split over ranks.
        packed = alone if count > 1 and "losses" not in found else None
        same = results.get((case, f"alone, {ROWS_PER_GPU * count} rows a step", 1), packed)
        worst = ""
        if same is not None and side != "stock":
            keys = ("losses",) if "losses" in found else ("first_loss", "last_loss")
            pairs = [list(one[key]) if key == "losses" else [one[key]] for key in keys for one in (found, same)]
            differences = [
                abs(a - b) / b for x, y in zip(pairs[::2], pairs[1::2], strict=True) for a, b in zip(x, y, strict=False)
            ]
            worst = f"{max(differences):.1e}"
        line = f"{case:<16}{side:<15}{count:>4}{speed:>10,}"
        line += f"{speed / (count * alone['tokens_per_second']):>8.3f}" if alone and count > 1 else f"{'':>8}"
        line += f"{speed / stock['tokens_per_second']:>9.2f}" if stock else f"{'':>9}"
        line += f"{worst:>12}{found.get('peak_gib', ''):>8}{found.get('estimated_gib', ''):>8}"
        saved = " / ".join(map(str, found.get("saved_s", [])))
        lines.append(line + f"{found['first_step_s']:>8}{saved:>14}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="folder of a random 8B base; rows and runs are beside it")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of GPUs; default: 1, 2, 4 and 8, if present")
    parser.add_argument("--only", choices=["packs", "rows"], help="run one part only")
    parser.add_argument("--sides", nargs="+", help="sides to run on several GPUs; default: all")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a case of packs")
    parser.add_argument("--timeout", type=int, default=150, help="limit of a case in seconds")
    parser.add_argument("--seconds", type=int, default=480, help="no case starts after these seconds")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", help="run one case, given as JSON (used by the script itself, in each process)")
    arguments = parser.parse_args()
    if arguments.case:
        run_case(argparse.Namespace(**json.loads(arguments.case)))
        return
    import torch

    started, present = time.perf_counter(), torch.cuda.device_count()
    counts = arguments.counts or [count for count in (1, 2, 4, 8) if count <= present]
    jobs = []
    if arguments.only != "packs":
        if arguments.base is None:
            sys.exit("--base is missing; make one: python scripts/make_random_base.py --model llama3_1_8b --out DIR")
        folder = arguments.base.parent / f"gpus-{os.getpid()}"
        folder.mkdir()
        rows = write_rows(folder / "rows.jsonl", NUM_STEPS * ROWS_PER_GPU * max(counts))
        jobs += list_row_jobs(counts, base=arguments.base, rows=rows, timeout=arguments.timeout)
    if arguments.only != "rows":
        jobs += list_pack_jobs(counts, steps=arguments.steps, timeout=arguments.timeout)
    jobs = [job for job in jobs if job.num_gpus == 1 or not arguments.sides or job.side in arguments.sides]
    # Cases of few GPUs first, to run side by side; the stock sides last.
    jobs.sort(key=lambda job: (job.side == "stock", job.num_gpus))
    lines = [gpu.describe_machine(), "command: python benchmarks/gpus.py " + " ".join(sys.argv[1:]), ""]
    print("\n".join(lines), flush=True)
    results, table = {}, []
    for job, found in run_jobs(jobs, num_gpus=present, deadline=started + arguments.seconds):
        if isinstance(found, dict):
            results[job.case, job.side, job.num_gpus] = found
        lines.append(
            f"{time.perf_counter() - started:4.0f} s  {job.case:<16} {job.side:<24} {job.num_gpus} {json.dumps(found)}"
        )
        print(lines[-1], flush=True)
        table = compare(dict(sorted(results.items(), key=lambda item: (item[0][0], item[0][2], item[0][1]))))
        if arguments.out:
            arguments.out.write_text("\n".join([*lines, *table]) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
