"""The verdict on a run, from its validation curve and the curve's uncertainty. See docs/verdict.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from tune2gguf.runs.curves import Curves, Validation
from tune2gguf.runs.intervals import Estimate, estimate_ratio
from tune2gguf.runs.verdict_file import Verdict
from tune2gguf.verdict.paired import Forecast, choose_best_crosswise, count_rows_needed

OVERFITTING, UNDERFITTING, GOOD_FIT, INCONCLUSIVE = "overfitting", "underfitting", "good fit", "inconclusive"
LABELS = (OVERFITTING, UNDERFITTING, GOOD_FIT, INCONCLUSIVE)

# Changes worth another run, as a share of the best adapter's gain over the base.
NOTABLE_RISE = 0.02
NOTABLE_FURTHER_GAIN = 0.08
# At a low loss, less: an eighth of the loss that is left, but at least 1 % of the gain.
NOTABLE_SHARE_OF_LOSS, LEAST_FURTHER_GAIN = 1 / 8, 0.01
# Smallest gain that counts, as a share of the base's loss.
NOTABLE_GAIN = 0.05
# The smallest p of a two-sided sign test is 2 * 0.5 ** rows: with five rows, even the same change in all misses 5 %.
MIN_ROWS = 6
# Fewer rows estimate their spread poorly, and the number of rows needed follows from it.
ENOUGH_ROWS = 20
# Shares of the summed learning rate between which a validation shows how the curve bends.
_MIDDLE = 0.2, 0.9


def judge(curves: Curves) -> Verdict:
    """Judge a run by its curves. A pure function.

    The figures, as far as they were computed: rows, base_loss, best_loss, best_step, final_loss, final_step; gain (of
    the best over the base, in nats), rise (of the final loss above the best) and further_gain (forecast for as much
    learning again), the latter two as shares of the gain, each with _low and _high; training_before and
    training_after (mean training loss up to the best and up to the final validation); rows_needed; diverged (1).
    """
    figures, verdict = _list_losses(curves), _find_obstacle(curves)
    if verdict is None:
        losses = _Losses.read(curves)
        gain = estimate_ratio(losses.base - losses.best, losses.tokens)
        figures |= _name("gain", gain)
        is_notable = gain.low > 0 and gain.high > NOTABLE_GAIN * curves.base.loss
        decide = _judge_curve if is_notable else _judge_without_gain
        verdict = decide(curves, losses, gain)
    return replace(verdict, figures=figures | verdict.figures)


@dataclass(frozen=True)
class _Losses:
    """Summed nats of each row: before training, at every validation after a step, at the best and the final one."""

    base: np.ndarray
    trained: np.ndarray  # [validations, rows]
    best: np.ndarray
    final: np.ndarray
    tokens: np.ndarray

    @classmethod
    def read(cls, curves: Curves) -> _Losses:
        trained = np.array([validation.row_losses for validation in _list_comparable(curves)])
        return cls(
            base=np.array(curves.base.row_losses),
            trained=trained,
            best=choose_best_crosswise(trained),
            final=trained[-1],
            tokens=np.array(curves.final.row_tokens, np.float64),
        )


def _find_obstacle(curves: Curves) -> Verdict | None:
    """Return the verdict on curves that lack something, None if they can be judged."""
    final, base = curves.final, curves.base
    if not curves.validations:
        return _leave_open("there are no validation rows, so learning cannot be told from memorizing")
    if any(not math.isfinite(one.loss) for one in curves.validations):
        return _leave_open("the validation loss is not a finite number: the run diverged", {"diverged": 1})
    if final is None:
        return _leave_open("the run ended before a validation after training; only the base was measured")
    if base is None:
        return _leave_open("the base was not measured before training, so there is nothing to compare with")
    if not (base.row_losses and final.row_losses):
        return _leave_open("the run recorded no losses of single rows, so the uncertainty is unknown")
    if base.row_tokens != final.row_tokens:
        return _leave_open("the base was measured on other rows than the adapter")
    if final.rows < MIN_ROWS:
        return _ask_for_rows(curves)
    return None


def _ask_for_rows(curves: Curves) -> Verdict:
    """Return the verdict on fewer than MIN_ROWS rows, which no test can decide on."""
    final, needed = curves.final, ENOUGH_ROWS
    if final.rows >= 2:
        losses = _Losses.read(curves)
        gained = losses.base - losses.best
        if gained.sum() > 0:
            # The rise from the best to the end takes the most rows to detect.
            needed = max(needed, count_rows_needed(losses.final - losses.best, gained, margin=NOTABLE_RISE))
            spread = np.array(losses.trained[0] - losses.final)
            needed = max(needed, count_rows_needed(spread, gained, margin=2 * NOTABLE_FURTHER_GAIN))
    reason = (
        f"{final.rows} validation row{'s' * (final.rows != 1)}: with fewer than {MIN_ROWS}, not even a change in all "
        f"of them is significant; about {needed} would decide it"
    )
    return _leave_open(reason, {"rows_needed": needed})


def _judge_curve(curves: Curves, losses: _Losses, gain: Estimate) -> Verdict:
    """Judge a run that gained over the base: did it lose some of it again, or was there more to gain?"""
    gained = losses.base - losses.best
    rise = estimate_ratio(losses.final - losses.best, gained)
    figures = _name("rise", rise) | _compare_training(curves)
    if rise.low > 0 and rise.value > NOTABLE_RISE:
        lost = (
            f"the validation loss rose from {curves.best.loss:.3f} (step {curves.best.step}) to "
            f"{curves.final.loss:.3f} (step {curves.final.step}): "
            f"{_describe_share(rise)} of the gain over the base was lost again"
        )
        return _judge_rise(lost, figures)
    if _is_open(rise, NOTABLE_RISE):
        needed = count_rows_needed(losses.final - losses.best, gained, margin=NOTABLE_RISE)
        reason = (
            f"the validation loss ended {_describe_share(rise)} of the gain above its best; {len(losses.tokens)} "
            f"rows do not tell whether {_percent(NOTABLE_RISE)} or more was lost again"
        )
        return _ask_for_more(reason, needed, curves, figures)
    verdict = _judge_end(curves, losses, gain)
    return replace(verdict, figures=figures | verdict.figures)


def _judge_rise(lost: str, figures: dict[str, float]) -> Verdict:
    """Tell memorizing from divergence: only divergence raises the training loss as well."""
    if figures.get("diverged"):
        return _leave_open(
            f"{lost}, and the training loss rose with it, from {figures['training_before']:.3f} to "
            f"{figures['training_after']:.3f}: the run diverged, which is no question of fit; the rate is too high",
            figures,
        )
    if "training_before" not in figures:
        return Verdict(OVERFITTING, (lost,), figures)
    went_on = (
        f"meanwhile the training loss went from {figures['training_before']:.3f} to {figures['training_after']:.3f}: "
        "the training rows are being memorized"
    )
    return Verdict(OVERFITTING, (lost, went_on), figures)


def _judge_end(curves: Curves, losses: _Losses, gain: Estimate) -> Verdict:
    """Judge a run that ended at about its best: had the curve flattened, or was it still falling?"""
    won = (
        f"the validation loss went from {curves.base.loss:.3f} to {curves.best.loss:.3f}, "
        f"a gain of {_describe_nats(gain)}"
    )
    middle = _find_middle(curves)
    if middle is None:
        reason = (
            "too few validations after training to see whether the curve had flattened; set a lower eval_every_n_steps"
        )
        return Verdict(INCONCLUSIVE, (reason, won))
    index, at = middle
    late, gained = losses.trained[index] - losses.final, losses.base - losses.final
    late_share = estimate_ratio(late, gained)
    forecast = Forecast(at, curves.final.loss / gain.value)
    further, printed = late_share.map(forecast.estimate), forecast.widen(late_share)
    notable = find_notable_gain(curves.final.loss, gain.value)
    figures = _name("further_gain", printed) | _name("late_share", late_share) | {"late_share_at": at}
    came = (
        f"{_percent(late_share.value)} of the gain came in the last {_percent(1 - at)} of the learning (learning rate "
        f"summed over steps); as much again would bring about {_describe_share(printed, 'likely')} more, "
        "unless it begins to overfit"
    )
    if late_share.low > 0 and further.value > notable:
        return Verdict(UNDERFITTING, (f"the validation loss was still falling: {came}", won), figures)
    if _is_open(further, notable):
        slope = _find_slope(forecast, late_share.value)
        needed = count_rows_needed(late, gained, margin=notable / slope)
        reason = f"{len(losses.tokens)} rows do not tell whether the curve had flattened: {came}"
        return _ask_for_more(reason, needed, curves, figures)
    flat = f"the curve had flattened: {came}"
    return Verdict(GOOD_FIT, (f"{won} and ended there, with no notable rise from its best", flat), figures)


def find_notable_gain(loss: float, gain: float) -> float:
    """Return the further gain that is worth another run, as a share of the gain.

    Args:
        loss: validation loss at the end
        gain: what it has gained over the base
    """
    return min(NOTABLE_FURTHER_GAIN, max(LEAST_FURTHER_GAIN, NOTABLE_SHARE_OF_LOSS * loss / gain))


def _judge_without_gain(curves: Curves, losses: _Losses, gain: Estimate) -> Verdict:
    """Judge a run whose best adapter is not significantly better than the base, or only by a trifle."""
    worse = estimate_ratio(losses.final - losses.base, losses.tokens)
    figures = _compare_training(curves)
    scale = NOTABLE_GAIN * curves.base.loss
    if worse.low > 0 and worse.value > scale:
        lost = (
            f"the validation loss never fell clearly below the base's {curves.base.loss:.3f}, and ended at "
            f"{curves.final.loss:.3f}, worse by {_describe_nats(worse)}"
        )
        return _judge_rise(lost, figures)
    size = "is not significant" if gain.low <= 0 else f"is less than {_percent(NOTABLE_GAIN)} of it"
    same = f"the gain over the base's {curves.base.loss:.3f} {size}: {_describe_nats(gain)}"
    if gain.high <= scale:
        return Verdict(UNDERFITTING, (same, "the model answers as it did before training"), figures)
    needed = count_rows_needed(losses.base - losses.best, losses.tokens, margin=scale)
    return _ask_for_more(same, needed, curves, figures)


def _is_open(estimate: Estimate, margin: float) -> bool:
    """Whether an estimate is undecided: above the margin but maybe zero, or below it but maybe twice the margin."""
    return estimate.low <= 0 if estimate.value > margin else estimate.high > 2 * margin


def _list_comparable(curves: Curves) -> list[Validation]:
    """Return the validations after step 0 that measured the same rows as the final one."""
    return [one for one in curves.trained if one.row_tokens == curves.final.row_tokens]


def _find_middle(curves: Curves) -> tuple[int, float] | None:
    """Return index and position of the validation nearest to half of the learning, None if none is near.

    Learning is the learning rate summed over steps. A schedule that ends at zero flattens the end of any curve, however
    much the model has still to learn. On this scale that end has no length.
    """
    rates = {step.step: step.lr or 0.0 for step in curves.training}
    comparable = _list_comparable(curves)
    if not any(rates.values()):
        rates = dict.fromkeys(range(1, comparable[-1].step + 1), 1.0)
    total = sum(rate for step, rate in rates.items() if step <= comparable[-1].step)
    positions = [sum(rate for step, rate in rates.items() if step <= one.step) / total for one in comparable[:-1]]
    near = [(abs(at - 0.5), index, at) for index, at in enumerate(positions) if _MIDDLE[0] <= at <= _MIDDLE[1]]
    return min(near)[1:] if near else None


def _find_slope(forecast: Forecast, late_share: float) -> float:
    """Return the slope of the forecast over the late share, at least 0.1."""
    step = 0.01
    rise = forecast.estimate(late_share + step) - forecast.estimate(late_share - step)
    return max(rise / (2 * step), 0.1)


def _compare_training(curves: Curves) -> dict[str, float]:
    """Return the mean training loss before the best and before the final validation, and diverged=1 if it rose."""
    from scipy import stats

    steps = [step for step in curves.training if step.loss is not None]
    distance = curves.final.step - curves.best.step
    window = min(distance, max(3, len(steps) // 10))
    before = [step.loss for step in steps if curves.best.step - window < step.step <= curves.best.step]
    after = [step.loss for step in steps if curves.final.step - window < step.step <= curves.final.step]
    if window < 1 or not before or not after:
        return {}
    means = {"training_before": sum(before) / len(before), "training_after": sum(after) / len(after)}
    if not math.isfinite(means["training_after"]):
        return means | {"diverged": 1}
    if min(len(before), len(after)) >= 3 and means["training_after"] > means["training_before"]:
        test = stats.ttest_ind(after, before, equal_var=False, alternative="greater")
        if test.pvalue < 0.025:
            return means | {"diverged": 1}
    return means


def _leave_open(reason: str, figures: dict[str, float] | None = None) -> Verdict:
    return Verdict(INCONCLUSIVE, (reason,), figures or {})


def _ask_for_more(reason: str, needed: int, curves: Curves, figures: dict[str, float]) -> Verdict:
    # If these rows should have been enough, the wide interval was bad luck; twice as many make that unlikely.
    needed = needed if needed > curves.final.rows else 2 * curves.final.rows
    return _leave_open(f"{reason}; about {needed} rows would decide it", figures | {"rows_needed": needed})


def _list_losses(curves: Curves) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, one in (("base", curves.base), ("best", curves.best), ("final", curves.final)):
        if one is not None:
            figures |= {f"{name}_loss": one.loss} | ({} if name == "base" else {f"{name}_step": one.step})
    return figures | ({"rows": curves.final.rows} if curves.final is not None else {})


def _name(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if abs(share) < 0.0995 else f"{100 * share:.0f} %"


def _describe_share(estimate: Estimate, kind: str = "95 % interval") -> str:
    return f"{_percent(estimate.value)} ({kind} {_percent(estimate.low)} to {_percent(estimate.high)})"


def _describe_nats(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} nats a token (95 % interval {estimate.low:.4f} to {estimate.high:.4f})"
