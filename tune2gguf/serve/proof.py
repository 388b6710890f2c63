"""The proof of an export: its files serve the trained ids, and their losses rise no more than the limit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tune2gguf.base.gguf_rounding import GGUF_SCHEME
from tune2gguf.commands import format_overrides, format_run, format_script
from tune2gguf.export.folder import BESIDE
from tune2gguf.export.gguf_file.imatrix import ImportanceMatrix
from tune2gguf.export.gguf_files import count_file_bytes
from tune2gguf.export.measure.step_losses import StepLoss, measure_groups, measure_steps
from tune2gguf.export.measure.validation_set import ValidationRow, ValidationSet, load_validation_rows
from tune2gguf.export.measure.weight_sources import (
    open_base_source,
    open_gguf_source,
    open_merged_source,
    open_quantized_source,
)
from tune2gguf.export.merge.adapter import Adapter, read_adapter
from tune2gguf.export.merge_choice import MergeChoice
from tune2gguf.export.pipeline import Export
from tune2gguf.export.results import open_bar
from tune2gguf.ggml.kernels import Kernels, load_kernels
from tune2gguf.ggml.types import QUANTIZATIONS
from tune2gguf.runs.files import CONFIG_FILE
from tune2gguf.runs.folder import find_free_folder
from tune2gguf.runs.forgetting import Forgetting
from tune2gguf.runs.intervals import Estimate, estimate_ratio
from tune2gguf.runs.proof import ProofRecord, write_proof
from tune2gguf.runs.run import Run
from tune2gguf.serve.serving import ServedFile, serve_file

BASE, ADAPTER, MERGED = "base", "adapter", "merged bf16"
COMPUTED_BY = "torch in float32; a file's weights are its dequantized tensors"
# llama.cpp rounds activations to 8 bits and its cache to 16, which changes the loss slightly.
MAX_SCORE_DIFFERENCE = 0.1  # nats per token


@dataclass(frozen=True)
class _File:
    """The files of one step that llama.cpp loads."""

    gguf_path: Path
    adapter_path: Path | None = None


@dataclass(frozen=True)
class _Subject:
    """The opened inputs of a proof."""

    run: Run
    merge: MergeChoice
    adapter: Adapter
    kernels: Kernels
    validation: ValidationSet
    importance: ImportanceMatrix | None
    general: list[ValidationRow]  # general prompts with the base's own answers


def prove_export(
    export: Export,
    *,
    num_rows: int = 16,
    num_replies: int = 3,
    max_loss_increase: float = 0.05,
    num_threads: int | None = None,
    show: bool = True,
) -> ProofRecord | None:
    """Prove an export on validation rows and write proof.json; None if the run has no validation rows.

    Args:
        num_rows: number of validation rows, the first ones
        num_replies: number of questions to ask each file
        max_loss_increase: limit on a file's validation loss over the trained model's, as a fraction of the latter
        num_threads: llama.cpp's threads; None chooses by the file's size

    Raises:
        ValueError: if a file is missing or cannot be loaded
    """
    validation = load_validation_rows(export.run, num_rows=num_rows)
    if validation is None:
        return None
    adapter = read_adapter(export.run.adapter_dir, export.merge.trained.specs)
    importance, general_rows = export.importance.matrix, _make_general_rows(export.run.forgetting)
    subject = _Subject(export.run, export.merge, adapter, load_kernels(), validation, importance, general_rows)
    served_files = _list_files(export)
    steps, general = _measure_export(subject, served_files, show=show)
    files = _serve_files(subject, served_files, steps, num_replies=num_replies, num_threads=num_threads)
    failures = [failure for name, served in files.items() for failure in _find_serving_failures(name, served)]
    failures += _find_loss_failures(subject, steps, max_loss_increase)
    proof = ProofRecord(
        passed=not failures,
        failures=failures,
        rows=len(validation.rows),
        supervised_tokens=len(steps[BASE].token_losses),
        losses_computed_by=COMPUTED_BY,
        steps={name: _describe_step(step) for name, step in steps.items()},
        lost_most=_find_step_that_lost_most(steps),
        merge=export.merge.describe(),
        served_by_llama_cpp={name: asdict(served) for name, served in files.items()},
        general={name: _compare_with_base(step, general[BASE], subject.general) for name, step in general.items()},
        general_prompts=len(subject.general),
    )
    write_proof(export.run.export_dir, proof)
    return proof


def _list_files(export: Export) -> dict[str, _File]:
    """Return the served files by the name of their step."""
    files = {model.step: _File(model.gguf_path) for model in export.models}
    if export.adapter is not None:
        files[export.adapter.step] = _File(export.adapter.base_path, export.adapter.adapter_path)
    return files


def _make_general_rows(forgetting: Forgetting | None) -> list[ValidationRow]:
    return [
        ValidationRow(
            np.array([*one.prompt_ids, *one.answer_ids]),
            np.repeat([False, True], [len(one.prompt_ids), len(one.answer_ids)]),
        )
        for one in (forgetting.answers if forgetting else ())
    ]


def _measure_export(
    subject: _Subject, files: dict[str, _File], *, show: bool
) -> tuple[dict[str, StepLoss], dict[str, StepLoss]]:
    """Return the step losses on validation rows against the adapter, and on general rows against the base."""
    trained, adapter = subject.merge.trained, subject.adapter
    sources = {
        BASE: open_base_source(trained, adapter=None),
        ADAPTER: open_base_source(trained, adapter=adapter),
    }
    if any(file.adapter_path is None for file in files.values()):
        sources[MERGED] = open_merged_source(subject.merge.chosen, adapter)
    for name, file in files.items():
        beside = None if file.adapter_path is None else adapter
        sources[name] = open_gguf_source(file.gguf_path, trained, adapter=beside)
    num_layers = len(sources) * trained.architecture.num_layers
    with open_bar("proving", total=num_layers, unit="layer", show=show) as bar:
        groups = [(subject.validation.rows, ADAPTER), *([(subject.general, BASE)] if subject.general else [])]
        steps, *general = measure_groups(sources, groups, report=bar.update)
    return steps, general[0] if general else {}


def _serve_files(
    subject: _Subject, files: dict[str, _File], steps: dict[str, StepLoss], *, num_replies: int, num_threads: int | None
) -> dict[str, ServedFile]:
    """Load each file in llama.cpp, and return what it makes of the validation rows."""
    validation = subject.validation
    return {
        name: serve_file(
            file.gguf_path,
            validation.tokenizer,
            validation.conversations,
            validation.rows,
            steps[name].token_losses,
            context_length=subject.run.max_seq_len,
            num_replies=num_replies,
            num_threads=num_threads,
            adapter_path=file.adapter_path,
        )
        for name, file in files.items()
    }


def _describe_step(step: StepLoss) -> dict[str, float]:
    """Return a step's loss, its divergence from the trained model, and how often both prefer the same token."""
    return {
        "loss": step.loss,
        "increase": step.increase,
        "kl_to_adapter": step.divergence,
        "top1": step.agreement,
    }


def _compare_with_base(step: StepLoss, base: StepLoss, rows: list[ValidationRow]) -> dict[str, float]:
    """Return a step's loss and divergence from the base, with intervals over the general prompts."""
    lengths = [len(row.positions) for row in rows]
    ends = np.cumsum(lengths)[:-1]

    def estimate(values: np.ndarray) -> Estimate:
        return estimate_ratio([part.sum(dtype=np.float64) for part in np.split(values, ends)], lengths)

    increase, divergence = estimate(step.token_losses - base.token_losses), estimate(step.token_divergences)
    return {
        "loss": step.loss,
        "increase": increase.value,
        "increase_low": increase.low,
        "increase_high": increase.high,
        "kl_to_base": divergence.value,
        "kl_to_base_low": divergence.low,
        "kl_to_base_high": divergence.high,
        "top1": step.agreement,
    }


def _find_step_that_lost_most(steps: dict[str, StepLoss]) -> str:
    """Return the step whose loss rises most over its predecessor's.

    Merging and a base's type follow the adapter, every other type follows the merged weights.
    """
    starts = {name: ADAPTER if name == MERGED or name.endswith(BESIDE) else MERGED for name in steps}
    losses = {name: step.loss - steps[starts[name]].loss for name, step in steps.items() if name not in (BASE, ADAPTER)}
    return max(losses, key=losses.__getitem__)


def _find_loss_failures(subject: _Subject, steps: dict[str, StepLoss], limit: float) -> list[str]:
    failures = []
    for name, step in steps.items():
        if name in (BASE, ADAPTER) or step.increase <= limit:
            continue
        failure = f"{name} raises the validation loss by {step.increase:.1%}; the limit is {limit:.1%}"
        if name == MERGED and not any(one.endswith(BESIDE) for one in steps):
            # Rounding the sum to bf16 can lose an adapter of few steps.
            unmerged = format_script("export", subject.run.run_dir, "--adapter-gguf", "--force")
            failure += f". Serve the adapter unrounded, in a file of its own (Modelfile-adapter):\n    {unmerged}"
        if name in QUANTIZATIONS:
            found = _find_smallest_type(subject, limit, larger_than=name)
            failure += f". {found}" if found else ". No larger type stays within it"
            if QUANTIZATIONS[name].is_trainable and subject.run.gguf_type is None:
                failure += f". Or train for the file itself:\n    {_format_training(subject.run, name)}"
        failures.append(failure)
    return failures


def _format_training(run: Run, type_name: str) -> str:
    """Return the command that repeats the run over the weights of a file of this type."""
    values = {"base_weights": f"{GGUF_SCHEME}{type_name}", "quantization": type_name, "dtype": "bf16"}
    folder = find_free_folder(run.run_dir.with_name(f"{run.name}-{type_name}"))
    overrides = format_overrides(values | {"output_dir": folder, "resume": False})
    config = run.run_dir / CONFIG_FILE
    return format_run("--config", config, *overrides)


def _find_smallest_type(subject: _Subject, limit: float, *, larger_than: str) -> str | None:
    """Return a sentence that names the smallest larger type within the limit, without writing files."""
    base, adapter, importance = subject.merge.chosen, subject.adapter, subject.importance
    kinds = [kind for kind in QUANTIZATIONS.values() if importance is not None or not kind.needs_importance]
    sizes = {kind.name: count_file_bytes(base, kind, has_importance=importance is not None) for kind in kinds}
    larger = sorted((size, name) for name, size in sizes.items() if size > sizes[larger_than])
    reference = open_base_source(subject.merge.trained, adapter=adapter)
    for _, name in larger:
        kind, ways = QUANTIZATIONS[name], [] if importance is None else [importance]
        # Like the export, take the better way.
        ways += [] if kind.needs_importance else [None]
        sources = {ADAPTER: reference}
        for number, way in enumerate(ways):
            source = open_quantized_source(base, adapter, kind, subject.kernels, importance=way)
            sources[f"{name} {number}"] = source
        steps = measure_steps(sources, subject.validation.rows, reference=ADAPTER)
        increase = min(step.increase for way, step in steps.items() if way != ADAPTER)
        if increase <= limit:
            return f"The smallest type within it is {name} ({increase:+.1%}): --quantization {name}"
    return None


def _find_serving_failures(name: str, served: ServedFile) -> list[str]:
    failures = []
    if served.tokens.num_equal + served.tokens.num_different == 0:
        failures.append(
            f"{name}: nothing to compare: each of the {served.tokens.num_skipped} conversations spells a special token"
        )
    if served.scores is None:
        failures.append(f"{name}: nothing to compare: llama.cpp reports no loss of any supervised token")
    if served.tokens.first_difference is not None:
        failures.append(f"{name}: llama.cpp serves other ids than were trained: {served.tokens.first_difference}")
    if served.scores is not None and not abs(served.scores.difference) <= MAX_SCORE_DIFFERENCE:
        failures.append(
            f"{name}: llama.cpp's loss is {served.scores.loss_by_llama_cpp:.3f}, that of the file's weights "
            f"{served.scores.loss_by_torch:.3f}"
        )
    endless = [reply for reply in served.replies if not reply.ended_by_itself]
    if endless:
        failures.append(f"{name}: {len(endless)} of {len(served.replies)} replies did not end by themselves")
    return failures


def format_table(proof: ProofRecord) -> str:
    """Return the proof as text for the terminal."""
    lines = [f"proof on {proof.rows} validation rows, {proof.supervised_tokens} supervised tokens ({COMPUTED_BY})", ""]
    lines.append(f"  {'step':<16} {'loss':>7} {'vs adapter':>11} {'KL':>8} {'top-1':>7}")
    for name, step in proof.steps.items():
        increase = "" if name == ADAPTER else f"{step['increase']:+.2%}"
        lines.append(
            f"  {name:<16} {step['loss']:7.4f} {increase:>11} {step['kl_to_adapter']:8.4f} {step['top1']:7.1%}"
        )
    lines += ["", f"the step that lost most: {proof.lost_most}"]
    if proof.merge is not None:
        lines.append(proof.merge)
    lines += _format_general(proof)
    for name, served in proof.served_by_llama_cpp.items():
        lines += ["", *_format_served(name, served)]
    if proof.failures:
        lines += ["", "NOT PROVEN", *(f"  {failure}" for failure in proof.failures)]
    elif any(served["replies"] for served in proof.served_by_llama_cpp.values()):
        lines += ["", "proven: ids, losses and replies are within the limits"]
    else:
        lines += ["", "proven: ids and losses are within the limits; no reply was asked for"]
    return "\n".join(lines)


def _format_general(proof: ProofRecord) -> list[str]:
    if not proof.general:
        return ["", "forgetting was not measured: the run scored no general prompts (score_general_prompts=true)"]
    lines = ["", f"forgetting: the base's own answers to {proof.general_prompts} general prompts", ""]
    lines.append(f"  {'step':<16} {'loss':>7} {'in nats, 95 % interval':>27} {'KL, 95 % interval':>27} {'top-1':>7}")
    for name, step in proof.general.items():
        columns = [
            f"{step[key]:+.3f} ({step[f'{key}_low']:+.3f} … {step[f'{key}_high']:+.3f})"
            for key in ("increase", "kl_to_base")
        ]
        lines.append(f"  {name:<16} {step['loss']:7.4f} {columns[0]:>27} {columns[1]:>27} {step['top1']:7.1%}")
    return lines


def _format_served(name: str, served: dict[str, Any]) -> list[str]:
    tokens, scores = served["tokens"], served["scores"]
    num_equal, num_skipped = tokens["num_equal"], tokens["num_skipped"]
    num_checked = num_equal + tokens["num_different"]
    lines = [f"{name} in llama.cpp: {num_equal} of {num_checked} conversations have the trained ids"]
    if num_skipped:
        lines.append(f"  ({num_skipped} not compared: their text spells a special token)")
    if scores is not None:
        lines.append(
            f"  loss of {scores['num_tokens']} tokens {scores['loss_by_llama_cpp']:.4f}, "
            f"by the file's weights {scores['loss_by_torch']:.4f}"
        )
    for reply in served["replies"]:
        end = "" if reply["ended_by_itself"] else " [cut]"
        question, text, reference = (" ".join(reply[part].split()) for part in ("question", "reply", "reference"))
        lines += [f"  Q         {question}", f"  reply     {text}{end}", f"  reference {reference}"]
    return lines
