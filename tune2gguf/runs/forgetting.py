"""forgetting.json: how far a run's adapter moves the model from its base on general prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tune2gguf.files.atomic import write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.files.records import make_record
from tune2gguf.runs.files import FORGETTING_FILE
from tune2gguf.runs.intervals import Estimate, estimate_ratio


@dataclass(frozen=True)
class GeneralAnswer:
    """A general prompt with the base's own answer, scored with and without the adapter.

    Attributes:
        prompt_ids, answer_ids: token ids of the base's prompt and answer
        base_loss, adapter_loss: cross entropy of the answer, summed over its tokens, in nats
        divergence: KL divergence of the adapter's model from the base, summed over the answer's tokens, in nats
        agreed: answer tokens that are the likeliest ones with the adapter, too
        adapter_answer: the answer with the adapter; None if it was not generated
    """

    prompt: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    base_loss: float
    adapter_loss: float
    divergence: float
    agreed: int
    adapter_answer: str | None = None


@dataclass(frozen=True)
class Forgetting:
    """The forgetting of a run: its adapter against the base, on the base's own greedy answers.

    Attributes:
        adapter: `best` or `last`
    """

    adapter: str
    answers: tuple[GeneralAnswer, ...]

    @cached_property
    def loss_increase(self) -> Estimate:
        """Increase of the loss on the base's answers, in nats per token; interval over prompts."""
        return self._estimate([one.adapter_loss - one.base_loss for one in self.answers])

    @cached_property
    def divergence(self) -> Estimate:
        """KL divergence from the base, in nats per token; interval over prompts."""
        return self._estimate([one.divergence for one in self.answers])

    @property
    def agreement(self) -> float:
        """Share of the base's tokens that stay the likeliest ones."""
        return sum(one.agreed for one in self.answers) / sum(len(one.answer_ids) for one in self.answers)

    def _estimate(self, sums: list[float]) -> Estimate:
        return estimate_ratio(sums, [len(one.answer_ids) for one in self.answers])

    def describe(self) -> str:
        """Return the sentence that a run prints about it."""
        increase, divergence = self.loss_increase, self.divergence
        return (
            f"forgetting: on the base's own answers to {len(self.answers)} general prompts the loss rises by "
            f"{increase.value:.3f} nats a token (95 % interval {increase.low:.3f} to {increase.high:.3f}), "
            f"KL {divergence.value:.3f} ({divergence.low:.3f} to {divergence.high:.3f}); "
            f"{self.agreement:.0%} of the base's tokens are still the likeliest"
        )


def write_forgetting(run_dir: Path, forgetting: Forgetting) -> None:
    """Write forgetting.json."""
    write_json(run_dir / FORGETTING_FILE, asdict(forgetting))


def read_forgetting(run_dir: Path) -> Forgetting | None:
    """Read forgetting.json; None if the run did not measure it.

    Raises:
        ValueError: if it is damaged
    """
    path = run_dir / FORGETTING_FILE
    return read_json(path, _parse) if path.is_file() else None


def _parse(values: Any) -> Forgetting:
    found = make_record(_Found, values)
    answers = tuple(make_record(GeneralAnswer, one) for one in found.answers)
    if len(answers) < 2 or not all(one.answer_ids for one in answers):
        raise ValueError("holds no answers, or an empty one")
    return Forgetting(found.adapter, answers)


@dataclass(frozen=True)
class _Found:
    adapter: str
    answers: list[Any]
