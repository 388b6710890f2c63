"""Whether a run fits into this machine's memory, and the first change that would make it fit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import OutOfMemoryError

from tune2gguf.commands import format_command, format_overrides
from tune2gguf.machine.devices import Device
from tune2gguf.machine.memory import Estimate, RunSpec, estimate_memory

GIGABYTE = 1e9
SHARED_BY = (2, 4, 8)  # numbers of devices to try for sharding


def describe_estimate(estimate: Estimate) -> list[str]:
    """Return a table of the parts, in GB."""
    parts = {
        "program": estimate.program,
        "base weights": estimate.weights,
        "adapter": estimate.adapter,
        "adapter gradients": estimate.gradients,
        "optimizer state": estimate.optimizer,
        "checkpoint copies": estimate.checkpoint,
        "activations": estimate.activations,
        "logits and temporaries": estimate.work,
        "training peak": estimate.training,
        "loading peak": estimate.loading,
    }
    return [f"  {name:<24}{size / GIGABYTE:8.2f} GB" for name, size in parts.items()]


def announce(spec: RunSpec, device: Device) -> None:
    """Print a run's estimated memory in one line, and a warning if the device has less."""
    estimate = estimate_memory(spec)
    adapter = estimate.adapter + estimate.gradients + estimate.optimizer + estimate.checkpoint
    parts = {"base": estimate.weights, "adapter": adapter, "activations": estimate.activations}
    parts |= {"work": estimate.work, "program": estimate.program}
    listed = ", ".join(f"{name} {size / GIGABYTE:.2f}" for name, size in parts.items())
    free = f"{device.free / GIGABYTE:.1f} GB are free on {device.name}"
    print(f"memory: about {estimate.peak / GIGABYTE:.2f} GB ({listed}); {free}")
    warning = find_warning(spec, device)
    if warning is not None:
        print(f"warning: {warning}", file=sys.stderr)


def fits(spec: RunSpec, free: int) -> bool:
    """Return whether the run fits into the free bytes of its device. On a CPU, all processes share them."""
    sharing = spec.num_devices if spec.device_type == "cpu" else 1
    return estimate_memory(spec).peak * sharing <= free


def find_fitting_change(spec: RunSpec, free: int) -> dict[str, object] | None:
    """Return the first overrides that make the run fit, None if none do.

    Tried in this order, later ones combined with earlier ones: shorter passes (same step), activation checkpointing
    (same adapter, slower), activation offloading (GPU only), an fp8 base, an nf4 base, sharding (GPU only).
    On a GPU with fp8 products, an fp8 base comes before activation checkpointing, because it is faster.
    """
    return next((change for change in list_changes(spec) if fits(replace(spec, **change), free)), None)


def list_changes(spec: RunSpec) -> Iterator[dict[str, object]]:
    """Yield changes of a spec in that order, each as field -> value."""
    shorter = [{"tokens_per_pass": tokens} for tokens in _halve(spec.tokens_per_pass, spec.longest_row)]
    recomputing = {} if spec.enable_activation_checkpointing else {"enable_activation_checkpointing": True}
    yield from shorter
    takes_fp8 = spec.base_weights in ("bf16", "fp32") and not spec.compile
    if takes_fp8 and spec.multiplies_fp8:
        for change in ({}, *shorter):
            yield {"base_weights": "fp8"} | change
    for change in ({}, *shorter):
        if recomputing:
            yield recomputing | change
    if spec.device_type == "cuda" and not spec.enable_activation_offloading:
        recomputing |= {"enable_activation_offloading": True}
        for change in ({}, *shorter):
            yield recomputing | change
    least = recomputing | (shorter[-1] if shorter else {})
    if takes_fp8:
        for change in ({}, recomputing, least):
            yield {"base_weights": "fp8"} | change
    if spec.base_weights != "nf4":
        for change in ({}, recomputing, least):
            yield {"base_weights": "nf4"} | change
        least = {"base_weights": "nf4"} | least
    if spec.device_type == "cuda":
        for num_devices in SHARED_BY:
            if num_devices >= spec.num_devices:
                yield least | {"parallel": "shard", "num_devices": num_devices}


def _halve(tokens: int, least: int) -> Iterator[int]:
    while tokens > least:
        tokens = max(least, tokens // 2)
        yield tokens


def advise(spec: RunSpec, free: int) -> str:
    """Return what to change for a run that does not fit."""
    change = find_fitting_change(spec, free)
    if change is not None:
        is_faster = spec.multiplies_fp8 and change.keys() == {"base_weights"} and change["base_weights"] == "fp8"
        return f"This would make it fit{', and faster' if is_faster else ''}: {_to_command(change)}"
    least = min((replace(spec, **change) for change in [{}, *list_changes(spec)]), key=_get_peak)
    return (
        f"No setting makes it fit: it needs at least {_get_peak(least) / GIGABYTE:.1f} GB. "
        f"Lower max_seq_len (rows have up to {spec.longest_row} tokens), or choose a smaller model."
    )


def _get_peak(spec: RunSpec) -> int:
    return estimate_memory(spec).peak


def _to_command(change: dict[str, object]) -> str:
    overrides = format_overrides({key: value for key, value in change.items() if key != "num_devices"})
    launch = f"tune run --nproc_per_node {change['num_devices']} … " if "num_devices" in change else ""
    return launch + format_command(*overrides)


def find_warning(spec: RunSpec, device: Device) -> str | None:
    """Return the warning for a run that will probably not fit."""
    if fits(spec, device.free):
        return None
    sharing = f" for each of {spec.num_devices} processes" if spec.num_devices > 1 else ""
    return (
        f"this run will probably run out of memory: it needs about {_get_peak(spec) / GIGABYTE:.1f} GB{sharing}, "
        f"and {device.free / GIGABYTE:.1f} GB are free on {device.name}. {advise(spec, device.free)}"
    )


def describe_fit(spec: RunSpec, device: Device) -> str:
    """Return in one line whether the run fits on a device of this machine."""
    head = f"{device.name} ({device.title}), {device.free / GIGABYTE:.1f} GB free"
    kept = "recomputed" if spec.enable_activation_checkpointing else "kept"
    head += f": {spec.tokens_per_pass} tokens per pass, activations {kept}, needs {_get_peak(spec) / GIGABYTE:.1f} GB"
    if spec.num_devices > 1 and spec.device_type == "cpu":
        head += f" for each of {spec.num_devices} processes"
    return f"{head}, fits" if fits(spec, device.free) else f"{head}, does not fit. {advise(spec, device.free)}"


@contextmanager
def explain_out_of_memory(spec: RunSpec, device: Device) -> Iterator[None]:
    """Turn an out-of-memory error of the block into one error that says what to change.

    Raises:
        ValueError: if memory runs out; what was saved before is complete
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The errors of Python, CUDA and torch's CPU allocator.
        if not isinstance(error, (MemoryError, OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        needed = f"it needs about {_get_peak(spec) / GIGABYTE:.1f} GB"
        # The run did not fit, so the advised change must need less than the estimate.
        limit = min(device.free, _get_peak(spec) - 1)
        raise ValueError(
            f"out of memory on {device.name}: {needed}, {device.free / GIGABYTE:.1f} GB were free at the start. "
            f"{advise(spec, limit)}\nSaved checkpoints and adapters are complete."
        ) from None
