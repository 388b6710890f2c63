"""A thousand steps of real models on a CPU: the peak of the memory on the way, beside the estimate.

    python benchmarks/soak.py --folder /tmp/soak --out benchmarks/results/soak_cpu.txt
    nice -n 15 python benchmarks/soak.py --folder /tmp/soak --cases "smollm2 bf16"

SmolLM2 trains the quickstart as it is, with validation, samples and checkpoints. The 1B shape has random weights; its
rows are short and of random lengths, and it answers no prompts, so that a thousand steps end. A case is one run of the
recipe. Its peak is that of metrics.jsonl, which never falls. The table has the peak after single steps, and its growth
after the step with the most tokens: steps draw their rows at random, so the fullest may come late. Below is the growth
after the last step of a new length: oneDNN keeps the products that it compiled for every padded length of a pass, and a
rare length comes late, too. Each finished case is a line of FOLDER/soaks.jsonl and is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.profile_step import describe_machine
from benchmarks.train_cases import REPOSITORY, WORDS, make_base
from tune2gguf.model.lengths import pad_length
from tune2gguf.runs.files import read_json_lines

CASES = {f"{base} {kind}": (base, kind) for base in ("smollm2", "1b") for kind in ("bf16", "fp32")}
SHOWN = (1, 10, 100, 250, 500, 1000)
FEWEST_WORDS, MOST_WORDS, NUM_ROWS = 4, 96, 120
MEMORY_LINE = re.compile(r"memory: about ([\d.]+) GB \((.*?)\)")


def write_rows(path: Path) -> Path:
    """Write rows of one to two hundred tokens, as many short ones as long ones by the logarithm."""
    draw = random.Random(0)
    rows = []
    for _ in range(NUM_ROWS):
        count = round(FEWEST_WORDS * (MOST_WORDS / FEWEST_WORDS) ** draw.random())
        prompt, reply = (" ".join(draw.choices(WORDS.split(), k=count)) for _ in range(2))
        rows.append({"prompt": prompt, "completion": reply})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_arguments(case: str, folder: Path, num_steps: int) -> list[str]:
    """Return the recipe's arguments, with as many epochs as the steps take."""
    base, kind = CASES[case]
    options = {"dtype": kind, "base_weights": kind, "device": "cpu"}
    if base == "smollm2":
        return ["--config", "examples/quickstart/lora.yaml", *_format(options), f"epochs={-(-num_steps // 65)}"]
    options |= {
        "base_dir": make_base("llama3_2_1b", folder),
        "base_source": "null",
        "dataset.files": f"[{write_rows(folder / 'rows.jsonl')}]",
        "dataset.validation_split": 0.1,
        "max_val_rows": 4,
        "num_samples": 0,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "save_every_n_steps": 500,
        "epochs": -(-num_steps // 54),
    }
    return ["--config", "configs/llama3_2_1b/lora.yaml", *_format(options)]


def _format(options: dict[str, object]) -> list[str]:
    return [f"{key}={value}" for key, value in options.items()]


def run_case(case: str, folder: Path, num_steps: int) -> dict:
    """Train; return the peak after each step, the epoch of each, and the estimate with its parts."""
    output_dir = folder / case.replace(" ", "_")
    shutil.rmtree(output_dir, ignore_errors=True)
    command = [sys.executable, "recipes/lora_finetune.py", *make_arguments(case, folder, num_steps)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    log = output_dir.with_suffix(".log")
    with log.open("wb") as output:
        done = subprocess.run(
            [*command, f"output_dir={output_dir}"], cwd=REPOSITORY, env=environment, stdout=output, stderr=output
        )
    if done.returncode != 0:
        sys.exit(f"{case} ended with {done.returncode}: {log}")
    steps = [record for record in read_json_lines(output_dir / "metrics.jsonl") if "lr" in record]
    estimate, parts = MEMORY_LINE.search(log.read_text()).groups()
    return {
        "case": case,
        "peaks": [step["peak_memory_bytes"] for step in steps],
        "epochs": [step["epoch"] for step in steps],
        "tokens": [step["tokens"] for step in steps],
        "estimate_gb": float(estimate),
        "parts": parts,
    }


def make_table(soaks: list[dict]) -> list[str]:
    """Return three lines per case: peaks in GB, their growth, and the last over the estimate."""
    lines = [
        f"{'peak GB after steps':22}" + "".join(f"{step:>7}" for step in SHOWN) + "   last   grown  estimate  ratio"
    ]
    for soak in soaks:
        peaks = soak["peaks"]
        shown = "".join(f"{peaks[step - 1] / 1e9:7.2f}" if step <= len(peaks) else f"{'':7}" for step in SHOWN)
        tokens, first_epoch = soak["tokens"], soak["epochs"].count(soak["epochs"][0])
        fullest = tokens.index(max(tokens))
        grown = peaks[-1] / peaks[fullest] - 1
        ratio = peaks[-1] / 1e9 / soak["estimate_gb"]
        lines.append(
            f"{soak['case']:22}{shown}{peaks[-1] / 1e9:7.2f}{grown:8.1%}{soak['estimate_gb']:10.2f}{ratio:7.2f}"
        )
        lengths = [pad_length(one) for one in tokens]
        newest = max(lengths.index(length) for length in set(lengths))
        lines += [
            f"  {len(peaks)} steps, {first_epoch} per epoch, of {min(tokens)} to {max(tokens)} tokens, the fullest at "
            f"step {fullest + 1}; {soak['parts']}",
            f"  {len(set(lengths))} padded lengths, the last one first at step {newest + 1}, and grown by "
            f"{peaks[-1] / peaks[newest] - 1:.1%} since",
        ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="the table; default: print only")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "soaks.jsonl"
    done = {soak["case"]: soak for soak in read_json_lines(results)} if results.exists() else {}
    for case in arguments.cases:
        if case not in done:
            done[case] = run_case(case, folder, arguments.steps)
            with results.open("a") as file:
                file.write(json.dumps(done[case]) + "\n")
    lines = [describe_machine(), "command: python benchmarks/soak.py", ""]
    lines += make_table([done[case] for case in CASES if case in done])
    print("\n".join(lines))
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
