"""Parts of an optimizer step: counts over all ranks, gradients, and the guard against NaN."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tune2gguf.base.weights import describe_weights
from tune2gguf.data import TokenizedRow, collate, make_empty_batch
from tune2gguf.data.packing import Pack
from tune2gguf.distributed.parallel import sum_gradients
from tune2gguf.distributed.signals import StopSignals
from tune2gguf.distributed.world import (
    AgreedError,
    World,
    broadcast_from_main,
    gather_counts,
    gather_over_ranks,
    sum_over_ranks,
)

MAX_ROWS_NAMED = 20


@dataclass(frozen=True)
class StepCounts:
    """Counts of one step over all ranks."""

    tokens: int
    supervised_tokens: int
    passes: int  # of the rank with the most

    def measure_speed(self, seconds: float) -> dict[str, float]:
        """Return the fields of metrics.jsonl for a step that took `seconds`."""
        return {
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens_per_second": self.supervised_tokens / seconds,
        }


def count_step(passes: list[list[TokenizedRow | Pack]]) -> StepCounts:
    """Return a step's counts, given this rank's passes. Every rank must call it."""
    rows = [row for one in passes for row in one]
    own = [sum(len(row.tokens) for row in rows), sum(row.num_supervised for row in rows), len(passes)]
    tokens, supervised_tokens, num_passes = gather_counts(own).unbind(1)
    return StepCounts(int(tokens.sum()), int(supervised_tokens.sum()), int(num_passes.max()))


def accumulate_gradients(
    model: nn.Module,
    parameters: list[Tensor],
    passes: list[list[TokenizedRow | Pack]],
    counts: StepCounts,
    *,
    world: World,
    stop: StopSignals,
) -> tuple[float, list[Tensor]]:
    """Accumulate the gradients of a step's passes, then sum them over ranks once.

    Args:
        parameters: the trained parameters
        passes: this rank's rows, by pass
        stop: checked before every pass

    Raises:
        StopRequested: in every process, if one was asked to stop

    Returns:
        the step's mean loss over all ranks, and the loss of each supervised position, by pass
    """
    position_losses = []
    for number in range(counts.passes):
        stop.raise_if_requested()
        # A rank may have fewer passes than others, or none; all compute equally often.
        batch = make_empty_batch() if number >= len(passes) else collate(passes[number])
        losses = model(**vars(batch.to(world.device)))
        # Divide by the count over all ranks, so that 2 x 4 rows equal 1 x 8.
        (losses.sum() / counts.supervised_tokens).backward()
        position_losses.append(losses.detach())
    sum_gradients(parameters, world)
    own = torch.stack([losses.double().sum() for losses in position_losses]).sum()
    return sum_over_ranks(own).item() / counts.supervised_tokens, position_losses


def compute_grad_norm(parameters: list[Tensor], *, clip_to: float | None) -> float:
    """Return the norm of all gradients together. If it exceeds `clip_to`, scale them down; None does not clip."""
    if clip_to is None:
        return float(get_total_norm([parameter.grad for parameter in parameters]))
    return float(clip_grad_norm_(parameters, clip_to))


def find_nonfinite(loss: float, grad_norm: float) -> str | None:
    """Return why a step must not reach the weights: loss or gradient norm is not finite. None if both are finite."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    return None if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"


def name_rows(passes: list[list[TokenizedRow | Pack]], position_losses: Iterable[Tensor]) -> list[str]:
    """Return file and line of all ranks' rows whose own loss is not finite, or of all rows if there are none.

    Every rank must call it.
    """
    own = []
    for rows, losses in zip(passes, position_losses, strict=False):  # empty passes follow those with rows
        parts = losses.split([row.num_supervised for row in rows])
        own += [(str(row.source), bool(part.isfinite().all())) for row, part in zip(rows, parts, strict=True)]
    rows = [row for rows in gather_over_ranks(own) for row in rows]
    return [source for source, is_finite in rows if not is_finite] or [source for source, _ in rows]


def refuse_damaged_base(loss: float, base_dir: str, world: World) -> None:
    """Raise ValueError if the loss before the first step is not finite. Every rank must call it.

    The adapter is still zero, so this is the base's loss, and skipping rows would not help.
    """
    if not math.isfinite(loss):
        found = _describe_weights(base_dir, world)
        raise ValueError(f"{base_dir}: the loss is {loss} before the first step, so the base is damaged: {found}")


def _describe_weights(base_dir: str, world: World) -> str:
    return broadcast_from_main(describe_weights(base_dir) if world.is_main else None)


def skip_step(
    step: int,
    problem: str,
    passes: list[list[TokenizedRow | Pack]],
    position_losses: Iterable[Tensor],
    *,
    on_nonfinite: str,
    base_dir: str,
    world: World,
) -> str:
    """Return why a step is not applied, and its rows. Every rank must call it.

    Raises:
        AgreedError: with that reason and the state of the base, if on_nonfinite is stop
    """
    sources = name_rows(passes, position_losses)
    more = f" and {len(sources) - MAX_ROWS_NAMED} more" if len(sources) > MAX_ROWS_NAMED else ""
    reason = f"step {step}: {problem}, so the step is not applied; rows: {', '.join(sources[:MAX_ROWS_NAMED])}{more}"
    if on_nonfinite == "stop":
        found = _describe_weights(base_dir, world)
        raise AgreedError(f"{reason}. To skip such steps: on_nonfinite=skip. In the base, {found}")
    return reason


def restore_optimizer(optimizer: Optimizer, state: dict) -> None:
    """Set the state of each parameter, as saved from `optimizer.state_dict()["state"]`."""
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def advance_schedule(schedule: LRScheduler, num_steps: int) -> None:
    """Advance a new schedule by `num_steps` steps. Exact even if the run is longer now."""
    with warnings.catch_warnings():
        # torch warns if the optimizer has not stepped first. It did, before the run was resumed.
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
        for _ in range(num_steps):
            schedule.step()
