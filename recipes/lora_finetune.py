"""Fine-tune a Llama with LoRA: setup → train → save, on a CPU, one GPU or many.

tune run recipes/lora_finetune.py --config configs/llama3_2_1b/lora.yaml [key=value …]
tune run --nproc_per_node 2 recipes/lora_finetune.py --config …
"""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

try:
    import tune2gguf  # noqa: F401
except ModuleNotFoundError:
    sys.exit("tune2gguf is not installed in this Python. From the root of its checkout: pip install -e .")

from tune2gguf.config import build_component, check_config, check_plan, load_config


class LoRAFinetuneRecipe:
    """One run. Every process of it does the same, on its own rows; only the main one writes and talks."""

    def __init__(self, cfg, warnings: list[str]) -> None:
        self.cfg = cfg
        self.warnings = warnings

    def setup(self) -> None:
        """Bring rows, model, optimizer and run folder into being; whatever the user got wrong shows up here."""
        from tune2gguf.distributed import agree_on_errors, broadcast_from_main, start_world
        from tune2gguf.memory import explain_out_of_memory

        self.world = start_world(self.cfg.device)
        with agree_on_errors():
            self._setup_data()
        self._plan_memory()
        with agree_on_errors():
            checkpoint = self._open_checkpoint()
        with explain_out_of_memory(self.shape, self.device):
            self._setup_model()
            self._setup_optimizer()
        self._restore(broadcast_from_main(checkpoint))
        with agree_on_errors():
            self._setup_run_folder()

    def _setup_data(self) -> None:
        from tune2gguf.data import plan_epoch

        cfg = self.cfg
        self.tokenizer = build_component(cfg.tokenizer)
        self.data = build_component(cfg.dataset, tokenizer=self.tokenizer, max_seq_len=cfg.max_seq_len, seed=cfg.seed)
        self.rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * self.world.size
        self.plan_epoch = lambda epoch: plan_epoch(
            len(self.data.sequences),
            seed=cfg.seed,
            epoch=epoch,
            batch_size=cfg.batch_size,
            accumulation_steps=cfg.gradient_accumulation_steps,
            world_size=self.world.size,
            rank=self.world.rank,
            lengths=self.data.lengths_to_group,
        )[: cfg.max_steps_per_epoch]
        self.steps_per_epoch = len(self.plan_epoch(0))
        self.num_training_steps = cfg.epochs * self.steps_per_epoch
        check_plan(
            num_rows=len(self.data.sequences),
            rows_per_step=self.rows_per_step,
            num_training_steps=self.num_training_steps,
            warmup_steps=cfg.warmup_steps,
        )

    def _open_checkpoint(self):
        """Read on rank 0 the checkpoint to go on from, if there is one: a refusal must not wait for the base."""
        from tune2gguf.checkpoints.digest import digest_base
        from tune2gguf.resume import describe_run, open_checkpoint

        cfg, world = self.cfg, self.world
        if not world.is_main:
            return None
        self.run = describe_run(
            cfg,
            base_digest=digest_base(cfg.base_dir),
            data_fingerprint=self.data.ledger["fingerprint"],
            num_processes=world.size,
            parallel=self.parallel,
        )
        return open_checkpoint(cfg.resume, Path(cfg.output_dir), self.run)

    def _plan_memory(self) -> None:
        """Say what the run will need before it takes it, and warn where it will not be there."""
        from tune2gguf.config import get_shape
        from tune2gguf.memory import find_warning, get_device, summarize
        from tune2gguf.parallel import choose_parallel

        longest = int(self.data.train.lengths().max()) if self.data.unit == "rows" else self.cfg.max_seq_len
        shape = get_shape(self.cfg, longest_row=longest, num_devices=self.world.size, parallel="replicate")
        self.parallel = choose_parallel(self.cfg.parallel, shape, self.world)
        self.shape = replace(shape, parallel=self.parallel)
        self.device = get_device(str(self.world.device))
        if self.world.is_main:
            print(summarize(self.shape, self.device))
            warning = find_warning(self.shape, self.device)
            if warning is not None:
                print(f"warning: {warning}", file=sys.stderr)

    def _setup_model(self) -> None:
        from tune2gguf.checkpoints.load import load_base
        from tune2gguf.distributed import agree_on_errors
        from tune2gguf.lora import initialize_adapters
        from tune2gguf.models import prepare_training
        from tune2gguf.parallel import replicate, shard
        from tune2gguf.seeds import seed_dropout

        cfg, world = self.cfg, self.world
        with agree_on_errors():
            self.model = build_component(cfg.model)
        prepare_training(
            self.model,
            compile=cfg.compile,
            enable_activation_checkpointing=cfg.enable_activation_checkpointing,
            enable_activation_offloading=cfg.enable_activation_offloading,
        )
        if self.parallel == "shard":
            shard(self.model, world)
        with agree_on_errors():
            load_base(self.model, cfg.base_dir, device=world.device, base_weights=cfg.base_weights, show=world.is_main)
        initialize_adapters(self.model, cfg.seed)
        self.trained_model = replicate(self.model, world) if self.parallel == "replicate" else self.model
        seed_dropout(cfg.seed, rank=world.rank)

    def _setup_optimizer(self) -> None:
        self.adapter_params = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_component(self.cfg.optimizer, self.adapter_params)
        self.schedule = build_component(
            self.cfg.lr_scheduler, self.optimizer, num_training_steps=self.num_training_steps
        )

    def _restore(self, checkpoint) -> None:
        from tune2gguf.architectures import read_architecture
        from tune2gguf.resume import Progress, restore_run
        from tune2gguf.seeds import capture_random_state

        self.progress = Progress()
        if checkpoint is not None:
            self.progress = restore_run(
                checkpoint,
                self.model,
                architecture=read_architecture(self.cfg.base_dir),
                optimizer=self.optimizer,
                schedule=self.schedule,
                world=self.world,
            )
        self._plan_validation()
        # As of the start of the step: a step that is broken off is taken again with the same masks.
        self.random_state = capture_random_state(self.world.device)
        self.checkpoint = checkpoint

    def _plan_validation(self) -> None:
        """Choose rows and steps of the validations; a run that goes on keeps those that it began with."""
        from tune2gguf.validation_plan import plan_validation

        at, cfg, held_out = self.progress, self.cfg, self.data.validation
        share_of_rows = min(1.0, self.steps_per_epoch * self.rows_per_step / len(self.data.sequences))
        self.validation = plan_validation(
            lengths=held_out.lengths(),
            digests=held_out.digests(),
            training_tokens=cfg.epochs * share_of_rows * int(self.data.train.lengths().sum()),
            steps_per_epoch=self.steps_per_epoch,
            epochs=cfg.epochs,
            every_n_steps=at.eval_every_n_steps or cfg.eval_every_n_steps,
            max_rows=at.num_val_rows or cfg.max_val_rows,
        )
        at.eval_every_n_steps, at.num_val_rows = self.validation.every_n_steps, len(self.validation.rows) or None
        self.validation_rows = held_out.take(self.validation.rows)

    def _setup_run_folder(self) -> None:
        from tune2gguf.checkpoints.state import CheckpointWriter
        from tune2gguf.record import RunRecord
        from tune2gguf.resume import enter_run_folder
        from tune2gguf.runs import describe_plan

        if not self.world.is_main:
            return
        cfg, device = self.cfg, str(self.world.device)
        self.folder = enter_run_folder(self.checkpoint, self.progress, cfg, data=self.data, device=device)
        self.record = RunRecord(self.folder)
        self.writer = CheckpointWriter(self.folder, keep_last=cfg.keep_last)
        trainable = sum(parameter.numel() for parameter in self.adapter_params)
        lines = describe_plan(
            cfg,
            self.data,
            world_size=self.world.size,
            device=device,
            parallel=self.parallel,
            num_trainable=trainable,
            validation=self.validation,
        )
        print("\n".join([*lines, f"{self.num_training_steps} steps in {cfg.epochs} epochs"]))
        for note in [*self.warnings, *self.data.ledger["notes"]]:
            print(f"note: {note}")

    def train(self) -> None:
        """Run all epochs, saving on the way; a signal or a step that is not finite ends them with all of it saved."""
        from tune2gguf.distributed import AgreedError, describe_error
        from tune2gguf.signals import StopRequested, StopSignals

        with StopSignals(show=self.world.is_main) as self.stop:
            try:
                self._train_epochs()
            except (StopRequested, AgreedError):
                self._save_checkpoint()
                if self.world.is_main:
                    self.writer.wait()
                    print(f"saved {self.writer.newest}; to go on from there: the same command with resume=auto")
                raise
            except OSError as error:
                raise ValueError(
                    f"{describe_error(error)}. The checkpoints before this are intact; "
                    "when it is mended, go on with the same command and resume=auto"
                ) from error
            finally:
                if self.world.is_main:
                    self.writer.close()

    def _train_epochs(self) -> None:
        from tqdm import tqdm

        self.model.train()
        at, num_steps = self.progress, self.num_training_steps
        save_every = self.cfg.save_every_n_steps or math.ceil(num_steps / 20)
        is_quiet = not self.world.is_main
        with tqdm(total=num_steps, initial=at.step, unit="step", disable=is_quiet, dynamic_ncols=True) as bar:
            self._observe()  # before training, or what the run that goes on had still to do
            while not self._is_over():
                for micro_batches in self.plan_epoch(at.epoch)[at.step_in_epoch :]:
                    self._show_step(self._train_step(micro_batches), bar)
                    if at.step_in_epoch == self.steps_per_epoch:
                        at.finish_epoch()
                    self._observe()
                    if at.step % save_every == 0 or at.step_in_epoch == 0 or self._is_over():
                        self._save_checkpoint()
                    if self._is_over():
                        break

    def _is_over(self) -> bool:
        at, cfg = self.progress, self.cfg
        return at.epoch == cfg.epochs or at.is_stopped_early(cfg.early_stopping_patience)

    def _show_step(self, record: dict, bar) -> None:
        from tune2gguf.steps import describe_speed

        if self.world.is_main:
            self.record.write_metrics(record)
            self.writer.raise_if_failed()
            if "skipped" in record:
                bar.write(f"note: {record['skipped']}")
            bar.set_postfix_str(describe_speed(record))
            bar.update()

    def _train_step(self, micro_batches: list[list[int]]) -> dict:
        """Take one optimizer step on this rank's rows; return what metrics.jsonl says of it."""
        from tune2gguf.memory import measure_peak
        from tune2gguf.seeds import capture_random_state
        from tune2gguf.steps import compute_grad_norm, count_step, find_nonfinite, leave_out_step

        started = time.perf_counter()
        rows = [[self.data.sequences[index] for index in indices] for indices in micro_batches]
        counts = count_step(rows)
        loss, batch_losses = self._accumulate_gradients(rows, counts)
        grad_norm = compute_grad_norm(self.adapter_params, clip_to=self.cfg.clip_grad_norm)
        record = {"step": self.progress.step + 1, "epoch": self.progress.epoch}
        problem = find_nonfinite(loss, grad_norm)
        if problem is None:
            record |= {"loss": loss, "lr": self.schedule.get_last_lr()[0], "grad_norm": grad_norm}
            self.optimizer.step()
        else:
            record["skipped"] = leave_out_step(
                record["step"], problem, rows, batch_losses, on_nonfinite=self.cfg.on_nonfinite
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.progress.finish_step()
        self.random_state = capture_random_state(self.world.device)
        seconds = time.perf_counter() - started
        return record | {
            "tokens_per_second": counts.tokens / seconds,
            "supervised_tokens_per_second": counts.supervised_tokens / seconds,
            "peak_memory_bytes": measure_peak(self.world.device),
        }

    def _accumulate_gradients(self, rows: list[list], counts) -> tuple[float, list]:
        """Add up the gradients of the step's micro-batches, reduced over ranks once.

        Returns:
            the step's mean loss over all ranks, and this rank's summed loss of each micro-batch
        """
        import torch

        from tune2gguf.data import collate
        from tune2gguf.distributed import sum_over_ranks
        from tune2gguf.parallel import reduce_gradients
        from tune2gguf.steps import make_empty_batch

        batch_losses = []
        for number in range(counts.micro_batches):
            self.stop.raise_if_requested()
            # In the last group a rank may have fewer rows than others, or none; all compute equally often.
            is_empty = number >= len(rows)
            batch = make_empty_batch() if is_empty else collate(rows[number], pad_id=self.tokenizer.pad_id)
            with reduce_gradients(self.trained_model, is_last=number == counts.micro_batches - 1):
                losses = self.trained_model(**vars(batch.to(self.world.device)))
                # Divide by the count over all ranks, so that 2 x 4 rows equal 1 x 8; torch then averages over ranks.
                (losses.sum() * (self.world.size / counts.supervised_tokens)).backward()
            batch_losses.append(losses.detach().double().sum())
        summed_loss = sum_over_ranks(torch.stack(batch_losses).sum())
        return summed_loss.item() / counts.supervised_tokens, batch_losses

    def _observe(self) -> None:
        """Look at how far the run is, where this step is one for it."""
        at = self.progress
        if self.validation.is_due(at.step, is_epoch_end=at.step_in_epoch == 0) and at.validated_step != at.step:
            if self.validation.rows:
                self.validate()
            at.validated_step = at.step

    def validate(self) -> None:
        """Measure the held-out loss; save the adapter as best/ if it is the lowest yet."""
        from tqdm import tqdm

        from tune2gguf.validate import compute_heldout_loss, describe_validation

        at = self.progress
        held_out = compute_heldout_loss(
            self.model,
            self.validation_rows,
            batch_size=self.cfg.batch_size,
            pad_id=self.tokenizer.pad_id,
            world=self.world,
            before_batch=self.stop.raise_if_requested,
        )
        if self.world.is_main:
            record = {
                "step": at.step,
                "epoch": at.epoch,
                **held_out.summarize(),
                "val_row_indices": self.validation.rows,
            }
            self.record.write_metrics(record)
            tqdm.write(describe_validation(record))
        if at.step > 0 and at.take_loss(held_out.mean):
            at.best_sha256 = self._save_adapter("best")

    def save(self) -> None:
        """Write the final adapter as last/."""
        from tune2gguf.distributed import stop_world, wait_for_all

        self._save_adapter("last")
        if self.world.is_main:
            print(f"wrote {self.folder}")
            print(f"next: python scripts/export.py {self.folder}")
        wait_for_all()
        stop_world()

    def _collect_adapter(self) -> tuple[dict, dict]:
        """Return the adapter's weights and config in PEFT's layout; every process has to ask for it."""
        from tune2gguf.architectures import read_architecture
        from tune2gguf.checkpoints.adapter import collect_adapter, make_peft_config, to_peft_layout

        cfg = self.cfg
        weights = to_peft_layout(collect_adapter(self.model), read_architecture(cfg.base_dir))
        config = make_peft_config(
            weights,
            rank=cfg.lora_rank,
            alpha=cfg.lora_alpha,
            dropout=cfg.lora_dropout,
            base_model_name=cfg.base_source or cfg.base_dir,
        )
        return weights, config

    def _save_adapter(self, name: str) -> str | None:
        from tune2gguf.checkpoints.adapter import save_adapter

        weights, config = self._collect_adapter()
        return save_adapter(self.folder / name, weights, config) if self.world.is_main else None

    def _save_checkpoint(self) -> None:
        """Begin to write all that the run needs to go on from its last whole step."""
        from tune2gguf.checkpoints.state import Checkpoint
        from tune2gguf.distributed import gather_over_ranks
        from tune2gguf.parallel import copy_to_cpu

        adapter, adapter_config = self._collect_adapter()
        optimizer = copy_to_cpu(self.optimizer.state_dict()["state"])
        state = {"optimizer": optimizer, "random": gather_over_ranks(self.random_state)}
        if self.world.is_main:
            progress = {**vars(self.progress), "recorded_bytes": self.record.sync(), "run": self.run}
            self.writer.start(self.progress.step, Checkpoint(adapter, adapter_config, state, progress))


def recipe_main() -> None:
    """Run the recipe; a user's mistake ends in one message and exit code 1, before anything slow where possible."""
    from tune2gguf.distributed import agree_on_errors
    from tune2gguf.failures import end_together
    from tune2gguf.memory import explain_out_of_memory

    with end_together():
        with agree_on_errors():
            cfg = load_config(sys.argv[1:])
            warnings = check_config(cfg)
        recipe = LoRAFinetuneRecipe(cfg, warnings)
        recipe.setup()
        with explain_out_of_memory(recipe.shape, recipe.device):
            recipe.train()
        recipe.save()


if __name__ == "__main__":
    recipe_main()
