"""Measurements of a run: validation losses and sample replies during training, forgetting at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from omegaconf import DictConfig
from torch import OutOfMemoryError
from tqdm import tqdm

from tune2gguf.data import PreparedData
from tune2gguf.data.tokenize import TokenizedRows
from tune2gguf.distributed.world import World, broadcast_from_main
from tune2gguf.model.llama import CausalLM
from tune2gguf.tokenizer.tokenizer import ChatTokenizer
from tune2gguf.train.forgetting import ForgettingPlan, measure_forgetting
from tune2gguf.train.progress import Progress
from tune2gguf.train.record import RunRecord
from tune2gguf.train.samples import Prompt, answer_prompts
from tune2gguf.train.validation import compute_validation_loss
from tune2gguf.train.validation_plan import GenerationCost, ValidationPlan, plan_validation


def plan_run_validation(
    cfg: DictConfig,
    data: PreparedData,
    at: Progress,
    *,
    rows_per_step: int,
    steps_per_epoch: int,
    generation: GenerationCost,
) -> ValidationPlan:
    """Plan a run's validations. A resumed run keeps its rows and steps, even with more epochs.

    Args:
        at: records the plan
        rows_per_step: rows or packs
    """
    validation_rows = data.ledger["validation"]
    trained_share = min(1.0, steps_per_epoch * rows_per_step / len(data.sequences))
    plan = plan_validation(
        lengths=data.validation.lengths(),
        digests=data.validation.digests(),
        training_tokens=cfg.epochs * trained_share * int(data.train.lengths().sum()),
        steps_per_epoch=steps_per_epoch,
        epochs=cfg.epochs,
        every_n_steps=at.eval_every_n_steps or cfg.eval_every_n_steps,
        max_rows=at.num_val_rows or cfg.max_val_rows,
        num_samples=cfg.num_samples,
        reply_tokens=validation_rows["supervised_tokens"] / max(1, validation_rows["rows"]),
        generation=generation,
    )
    at.eval_every_n_steps, at.num_val_rows = plan.every_n_steps, len(plan.rows) or None
    return plan


@dataclass(frozen=True)
class Validator:
    """Measures the validation loss and answers prompts. In the main process it records the results."""

    model: CausalLM
    tokenizer: ChatTokenizer
    validation: ValidationPlan
    rows: TokenizedRows  # the validation rows to measure
    prompts: list[Prompt]
    forgetting: ForgettingPlan
    tokens_per_pass: int
    max_seq_len: int
    world: World
    is_sharded: bool
    record: RunRecord | None

    def measure(self, at: Progress, *, before_pass: Callable[[], None]) -> float | None:
        """Return the validation loss in nats per supervised token, None without rows. Every process must call it.

        Args:
            before_pass: called equally often by all processes; may raise to stop
        """
        if not self.rows:
            return None
        loss = compute_validation_loss(
            self.model,
            self.rows,
            tokens_per_pass=self.tokens_per_pass,
            world=self.world,
            before_pass=before_pass,
        )
        if self.record is not None:
            self.record.write_validation(loss.at(at.step, at.epoch, row_indices=self.validation.rows))
        return loss.mean

    def answer(self, at: Progress, *, after_token: Callable[[], None]) -> None:
        """Answer the validation prompts: in the main process, or in all processes if the model is sharded.

        Args:
            after_token: called equally often by all processes, if all of them answer; may raise to stop
        """
        if not self.prompts or not (self.is_sharded or self.world.is_main):
            return

        def agree(tokens: list[int]) -> list[int]:
            if self.is_sharded or self.world.size == 1:
                after_token()
            return self._agree(tokens)

        answers = answer_prompts(
            self.model,
            self.tokenizer,
            self.prompts,
            step=at.step,
            epoch=at.epoch,
            max_seq_len=self.max_seq_len,
            max_tokens=self.validation.max_reply_tokens,
            device=self.world.device,
            agree=agree,
        )
        if self.record is not None:
            self.record.write_samples(answers)

    def _agree(self, tokens: list[int]) -> list[int]:
        # Processes that continued with different tokens would wait for each other forever.
        return broadcast_from_main(tokens) if self.is_sharded else tokens

    def score_general_prompts(self, adapter_name: str) -> None:
        """Measure the forgetting of the model's current adapter, in the processes that answer prompts."""
        if not self.forgetting.prompts or not (self.is_sharded or self.world.is_main):
            return
        try:
            forgetting = measure_forgetting(
                self.model,
                self.tokenizer,
                self.forgetting,
                adapter_name=adapter_name,
                tokens_per_pass=self.tokens_per_pass,
                max_seq_len=self.max_seq_len,
                device=self.world.device,
                agree=self._agree,
            )
        except OutOfMemoryError:  # must not fail a run whose adapters are written
            tqdm.write("note: forgetting is not measured: out of memory")
            return
        if self.record is not None:
            self.record.write_forgetting(forgetting)

    def show(self) -> None:
        """Update report.html."""
        if self.record is not None:
            self.record.write_report()
