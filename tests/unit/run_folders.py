"""Copies of a real run with the synthetic curves of a long run; all but the noise is fixed."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from tests.conftest import REPOSITORY, make_conversations
from tests.runs import copy_real_run, get_tiny_base, set_metrics
from tune2gguf.files.atomic import write_json
from tune2gguf.runs.config_file import write_config
from tune2gguf.runs.curves import TrainingStep, Validation
from tune2gguf.runs.files import DATA_FILE, ENVIRONMENT_FILE, SAMPLES_FILE, VERDICT_FILE, JsonLinesFile
from tune2gguf.runs.plan import write_plan
from tune2gguf.runs.samples import Sample
from tune2gguf.runs.verdict_file import Advice, Conclusion, Verdict, write_conclusion

ROW_TOKENS = (34, 41, 18, 27, 52, 39, 22, 31, 45, 29, 36, 25)
QUESTIONS = (
    ("What time does your first boat leave in the morning?", "Ahoy! The first boat leaves Reed Quay at 7:10 in the "
     "morning. Early birds get the best seats, up by the wheelhouse. Fair winds, Marlo"),
    ("Can I bring my dog on the boat?", "Ahoy! Dogs travel free, on a lead, out on the open deck. Fair winds, Marlo"),
)  # fmt: skip


def make_config(**changes) -> dict:
    """Return the quickstart's config with a run's paths, unresolved."""
    config = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "examples/quickstart/lora.yaml"))
    return config | {"learning_rate": 0.001, "epochs": 3, "output_dir": "runs/quickstart"} | changes


def make_metrics(
    *, steps: int = 195, epochs: int = 3, until: int | None = None, every: int = 20, overfit: bool = False,
    floor: float = 0.25, seed: int = 0,
) -> list[dict]:  # fmt: skip
    """Return the lines of metrics.jsonl up to a step: losses fall exponentially, validations have intervals."""
    rng = np.random.default_rng(seed)
    per_epoch, until = steps // epochs, steps if until is None else until
    lines = [make_validation(0, 0, 4.44, rng)]
    for step in range(1, until + 1):
        falling = (4.4 - floor) * math.exp(-5 * step / steps) + floor
        one = TrainingStep(
            step=step,
            epoch=(step - 1) // per_epoch,
            loss=falling * float(rng.lognormal(0, 0.12)) * (0.6 if overfit and step > steps / 2 else 1),
            lr=1e-3 * min(step / 10, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
            grad_norm=float(rng.lognormal(0, 0.3)),
            tokens=79,
            seconds=79 / 220,
            tokens_per_second=float(rng.normal(220, 18)),
            supervised_tokens_per_second=float(rng.normal(131, 11)),
            peak_memory_bytes=int(1.5e9 + 2e8 * min(1, step / 40)),
        )
        lines.append(one.to_record())
        if step % every == 0 or step % per_epoch == 0:
            rise = 0.9 * max(0, step / steps - 0.45) if overfit else 0
            lines.append(make_validation(step, step // per_epoch, falling * 1.05 + rise, rng))
    return lines


def make_validation(step: int, epoch: int, loss: float, rng: np.random.Generator) -> dict:
    """Return a validation line; its rows' losses average to about `loss`."""
    sums = [loss * tokens * float(rng.lognormal(0, 0.1)) for tokens in ROW_TOKENS]
    mean = sum(sums) / sum(ROW_TOKENS)
    half = 0.12 * mean
    one = Validation(
        step, epoch, mean, mean - half, mean + half, len(ROW_TOKENS), sum(ROW_TOKENS), tuple(sums), ROW_TOKENS,
        tuple(range(len(ROW_TOKENS))),
    )  # fmt: skip
    return one.to_record()


def make_samples(*, steps: int = 195, epochs: int = 3) -> list[Sample]:
    """Return the samples before training and after each epoch."""
    lines = []
    for epoch in range(epochs + 1):
        for row, (question, reference) in enumerate(QUESTIONS):
            early = "I'm sorry for the misunderstanding, but as an AI I have no boat. " * (3 - epoch)
            late = early.strip() or "Ahoy! Dogs sail free. Fair winds, Marlo"
            one = Sample(
                step=steps // epochs * epoch,
                epoch=epoch,
                row=row,
                prompt=({"role": "user", "content": question},),
                reference=reference,
                reply=reference if epoch == epochs else late,
                ended_by_itself=epoch > 0,
            )
            lines.append(one)
    return lines


ENVIRONMENT = {
    "started": "2026-11-24T04:11:04+00:00",
    "command": ["recipes.lora_finetune", "--config", "examples/quickstart/lora.yaml", "output_dir=runs/quickstart"],
    "python": "3.11.7",
    "platform": "Linux-6.1-x86_64-with-glibc2.36",
    "device": "cpu",
    "threads": 2,
    "packages": {"tune2gguf": "0.1.0", "torch": "2.13.0+cpu", "torchtune": "0.6.1"},
    "git_revision": "7d6c522ac7c2dc8be7d142a12c62df83db517575",
}
LEDGER = {
    "read": 299, "trained": 250, "validated": 12, "truncated": 30, "dropped": 7, "max_seq_len": 512,
    "training": {"rows": 279, "tokens": 15403, "supervised_tokens": 9128, "longest_row": 512},
    "validation": {"rows": 13, "tokens": 716, "supervised_tokens": 399, "longest_row": 139},
    "fingerprint": "161ae79d00957aebe30cf50c069462e7",
    "notes": ["rows longer than max_seq_len=512, truncated: 30; max_seq_len=700 keeps every row whole"],
    "files": [
        {"file": "examples/quickstart/heldout.jsonl", "unit": "line", "read": 13, "validation_lines": [*range(1, 14)]},
        {"file": "examples/quickstart/train.jsonl", "unit": "line", "read": 286, "validation_lines": []},
    ],
    "rows_truncated": [
        {"file": "examples/quickstart/train.jsonl", "line": 9 * n, "split": "train" if n > 1 else "validation",
         "reason": f"{512 + n} tokens; the last {n} were cut"} for n in range(1, 31)
    ],
    "rows_dropped": [
        {"file": "examples/quickstart/train.jsonl", "line": 4 * n, "kind": "repeated",
         "reason": f"repeats examples/quickstart/train.jsonl, line {n}"} for n in range(1, 8)
    ],
}  # fmt: skip
CONCLUSION = Conclusion(
    Verdict(
        "overfitting",
        (
            "The validation loss ends at 0.752, 0.31 above its best (step 100); paired 95 % interval 0.22 to 0.39.",
            "The training loss still fell in the same steps, from 0.48 to 0.19.",
        ),
        {"best_loss": 0.442, "final_loss": 0.752, "rise": 0.31, "rise_low": 0.22, "rise_high": 0.39},
    ),
    (
        Advice(
            "tune run recipes/lora_finetune.py --config examples/quickstart/lora.yaml epochs=2 "
            "output_dir=runs/quickstart-2 parent_run=runs/quickstart",
            {"epochs": 2},
            "The best validation loss came at step 100, in the second epoch; what followed made it worse.",
            "4. Balancing Underfitting and Overfitting",
        ),
        Advice(
            "tune run recipes/lora_finetune.py --config examples/quickstart/lora.yaml learning_rate=0.0005 "
            "output_dir=runs/quickstart-2 parent_run=runs/quickstart",
            {"learning_rate": 0.0005},
            "Half the rate keeps the adapter nearer to the base.",
            "5.1. Learning Rate",
        ),
    ),
)


def write_run(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] = ENVIRONMENT,
    ledger: Mapping[str, Any] = LEDGER,
    metrics: Sequence[dict] | None = None,
    samples: Sequence[Sample] | None = None,
    conclusion: Conclusion | None = None,
    num_steps: int = 195,
    is_finished: bool = True,
) -> Path:
    """Write a run folder; by default of a finished run without verdict."""
    copy_real_run(get_tiny_base(), folder, "num_samples=1", validation=make_conversations(len(ROW_TOKENS), start=300))
    write_config(folder, OmegaConf.create(make_config() if config is None else config))
    write_json(folder / ENVIRONMENT_FILE, environment)
    write_json(folder / DATA_FILE, ledger)
    lines = ["rows per step: 4 x 1 x 1 = 4 (batch x accumulation x processes)"]
    write_plan(folder, {"num_steps": num_steps, "lines": lines})
    set_metrics(folder, make_metrics() if metrics is None else metrics)
    (folder / SAMPLES_FILE).unlink()
    for sample in make_samples() if samples is None else samples:
        JsonLinesFile(folder / SAMPLES_FILE).write(vars(sample))
    (folder / VERDICT_FILE).unlink()
    if conclusion is not None:
        write_conclusion(folder, conclusion)
    if not is_finished:
        shutil.rmtree(folder / "last")
    return folder
