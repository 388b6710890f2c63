"""Fine-tune a Llama with LoRA: setup → train → save, on a CPU, one GPU or many.

tune run recipes/lora_finetune.py --config configs/llama3_2_1b/lora.yaml [key=value …]
tune run --nproc_per_node 2 recipes/lora_finetune.py --config …
"""

import math
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

try:
    import tune2gguf  # noqa: F401
except ModuleNotFoundError:
    sys.exit("tune2gguf is not installed in this Python. From the root of its checkout: pip install -e .")

from tqdm import tqdm

from tune2gguf.base.load import load_base
from tune2gguf.base.source import name_base
from tune2gguf.commands import format_script
from tune2gguf.config import (
    build_component,
    build_metric_logger,
    build_optimizer,
    check_config,
    check_plan,
    load_config,
)
from tune2gguf.config.run_spec import get_run_spec
from tune2gguf.data import count_step_tokens, lay_out_passes, plan_epoch
from tune2gguf.distributed.failures import end_together
from tune2gguf.distributed.parallel import choose_parallel, shard
from tune2gguf.distributed.signals import StopSignals
from tune2gguf.distributed.world import (
    agree_on_errors,
    broadcast_from_main,
    gather_over_ranks,
    is_main_process,
    start_world,
    stop_world,
    wait_for_all,
)
from tune2gguf.files.output import print_in_any_encoding
from tune2gguf.machine.devices import get_device, measure_peak
from tune2gguf.machine.fit import announce, explain_out_of_memory
from tune2gguf.machine.passes import choose_passes
from tune2gguf.model.architectures import read_architecture
from tune2gguf.model.lengths import pad_length
from tune2gguf.model.llama import prepare_training
from tune2gguf.model.lora import initialize_adapters
from tune2gguf.model.sharding import copy_to_cpu
from tune2gguf.runs.adapter import collect_peft_adapter, read_adapter_weights, restore_adapter, save_adapter
from tune2gguf.runs.checkpoints import Checkpoint, CheckpointWriter
from tune2gguf.runs.curves import TrainingStep
from tune2gguf.runs.lock import hold_run_folder
from tune2gguf.runs.plan import LAYOUT_KEYS, Plan, write_plan
from tune2gguf.runs.validation_rows import read_validation_rows
from tune2gguf.train.compiling import compile_kernels_meanwhile
from tune2gguf.train.forgetting import plan_forgetting
from tune2gguf.train.plan import describe_plan
from tune2gguf.train.record import RunRecord, check_learned
from tune2gguf.train.resume import (
    check_machines,
    describe_run,
    enter_run_folder,
    open_checkpoint,
    read_layout,
    restore_run,
    save_when_stopped,
)
from tune2gguf.train.samples import choose_prompts
from tune2gguf.train.schedules import compute_learned_share
from tune2gguf.train.seeds import capture_random_state, seed_dropout
from tune2gguf.train.steps import (
    accumulate_gradients,
    compute_grad_norm,
    count_step,
    find_nonfinite,
    refuse_damaged_base,
    skip_step,
)
from tune2gguf.train.validation_plan import get_generation_cost
from tune2gguf.train.validator import Validator, plan_run_validation


class LoRAFinetuneRecipe:
    """One run. Every process does the same on its own rows. Only the main process writes files and prints."""

    def __init__(self, cfg, warnings: list[str]) -> None:
        self.cfg = cfg
        self.warnings = warnings

    def setup(self) -> None:
        """Create rows, model, optimizer and run folder. Mistakes of the user are raised here."""
        self.world = start_world(self.cfg.device)
        with agree_on_errors():
            self._setup_data()
        self._plan_memory()
        scaling = self.cfg.lora_alpha / self.cfg.lora_rank
        with compile_kernels_meanwhile(self.spec, scaling=scaling, device=self.world.device, show=self.world.is_main):
            checkpoint = self._open_checkpoint()
            with explain_out_of_memory(self.spec, self.device):
                self._setup_model()
                self._setup_optimizer()
        self._restore(broadcast_from_main(checkpoint))
        with agree_on_errors():
            self._setup_run_folder(checkpoint)
        self._setup_validator()

    def _setup_data(self) -> None:
        cfg = self.cfg
        self.tokenizer = build_component(cfg.tokenizer)
        self.data = build_component(cfg.dataset, tokenizer=self.tokenizer, max_seq_len=cfg.max_seq_len, seed=cfg.seed)
        self.rows_per_step = cfg.batch_size * cfg.gradient_accumulation_steps * self.world.size
        self.lengths = self.data.sequence_lengths
        self.plan_epoch = lambda epoch: plan_epoch(
            self.lengths,
            seed=cfg.seed,
            epoch=epoch,
            rows_per_step=self.rows_per_step,
            world_size=self.world.size,
            rank=self.world.rank,
        )[: cfg.max_steps_per_epoch]
        self.steps_per_epoch = len(self.plan_epoch(0))
        self.num_steps = cfg.epochs * self.steps_per_epoch
        check_plan(
            num_rows=len(self.data.train),
            unit=self.data.unit,
            num_packs=len(self.data.sequences) if self.data.unit == "packs" else None,
            rows_per_step=self.rows_per_step,
            num_training_steps=self.num_steps,
            warmup_steps=cfg.warmup_steps,
        )

    def _open_checkpoint(self):
        """Return the checkpoint to resume from, on rank 0. A refusal must come before the base is loaded."""
        cfg, world = self.cfg, self.world
        with agree_on_errors():
            self.run = describe_run(cfg, self.data.ledger["fingerprint"], parallel=self.parallel, world=world)
        check_machines(cfg, self.run)
        with agree_on_errors():
            return open_checkpoint(cfg.resume, Path(cfg.output_dir), self.run) if world.is_main else None

    def _plan_memory(self) -> None:
        """Choose parallel and passes. Print the memory that the run needs, and warn if it does not fit."""
        cfg = self.cfg
        self.device = get_device(str(self.world.device))
        spec = get_run_spec(cfg, longest_row=int(self.lengths.max()), num_devices=self.world.size, parallel="replicate")
        self.parallel = choose_parallel(cfg.parallel, spec, self.world)
        step_tokens = count_step_tokens(self.lengths, self.plan_epoch, epochs=cfg.epochs)
        spec = choose_passes(
            replace(spec, parallel=self.parallel, num_lengths=len({pad_length(tokens) for tokens in step_tokens})),
            self.device.free,
            tokens_per_pass=cfg.tokens_per_pass,
            checkpointing=cfg.enable_activation_checkpointing,
            tokens_per_step=max(step_tokens),
        )
        # All processes use the main process's layout, or the one that the run began with.
        began_with = read_layout(cfg.resume, Path(cfg.output_dir)) if self.world.is_main else {}
        self.spec = broadcast_from_main(replace(spec, **began_with))
        if self.world.is_main:
            announce(self.spec, self.device)

    def _setup_model(self) -> None:
        cfg, world = self.cfg, self.world
        with agree_on_errors():
            self.model = build_component(cfg.model)
        prepare_training(
            self.model,
            compile=cfg.compile,
            enable_activation_checkpointing=self.spec.enable_activation_checkpointing,
            enable_activation_offloading=cfg.enable_activation_offloading,
            fuse=self.spec.obstacle_to_fusing is None,
        )
        if self.parallel == "shard":
            shard(self.model, world)
        with agree_on_errors():
            load_base(
                self.model,
                cfg.base_dir,
                device=world.device,
                base_weights=cfg.base_weights,
                show=world.is_main,
            )
        initialize_adapters(self.model, cfg.seed)
        seed_dropout(cfg.seed, rank=world.rank)

    def _setup_optimizer(self) -> None:
        self.adapter_params = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.cfg.optimizer, self.adapter_params)
        self.schedule = build_component(self.cfg.lr_scheduler, self.optimizer, num_training_steps=self.num_steps)

    def _restore(self, checkpoint) -> None:
        cfg, world, architecture = self.cfg, self.world, read_architecture(self.cfg.base_dir)
        self.progress = restore_run(
            checkpoint,
            self.model,
            architecture=architecture,
            optimizer=self.optimizer,
            schedule=self.schedule,
            world=world,
        )
        # As of the start of the step: an interrupted step is repeated with the same masks.
        self.random_state = capture_random_state(world.device)
        self.collect_adapter = partial(
            collect_peft_adapter,
            self.model,
            architecture,
            rank=cfg.lora_rank,
            alpha=cfg.lora_alpha,
            dropout=cfg.lora_dropout,
            base_model_name=name_base(Path(cfg.base_dir)),
        )
        generation = get_generation_cost(world.device, world.size)
        self.validation = plan_run_validation(
            cfg,
            self.data,
            self.progress,
            rows_per_step=self.rows_per_step,
            steps_per_epoch=self.steps_per_epoch,
            generation=generation,
        )
        self.forgetting = plan_forgetting(
            self.tokenizer,
            score=cfg.score_general_prompts,
            max_seq_len=cfg.max_seq_len,
            training_tokens=self.validation.training_tokens,
            generation=generation,
        )

    def _setup_run_folder(self, checkpoint) -> None:
        self.record, self.writer, self.prompts = None, None, []
        if not self.world.is_main:
            return
        cfg, device = self.cfg, str(self.world.device)
        with enter_run_folder(checkpoint, self.progress, cfg, data=self.data, device=device) as folder:
            rows = read_validation_rows(folder)
            self.prompts = choose_prompts(
                rows, self.tokenizer, num_samples=cfg.num_samples, max_seq_len=cfg.max_seq_len
            )
            lines = describe_plan(
                cfg,
                self.data,
                world_size=self.world.size,
                device=device,
                parallel=self.parallel,
                num_trainable=sum(parameter.numel() for parameter in self.adapter_params),
                validation=self.validation,
                prompts=self.prompts,
                forgetting=self.forgetting,
                num_steps=self.num_steps,
                spec=self.spec,
            )
            layout = {key: getattr(self.spec, key) for key in LAYOUT_KEYS}
            write_plan(folder, Plan(num_steps=self.num_steps, lines=lines, **layout))
        self.folder = Path(cfg.output_dir)
        self.record = RunRecord(self.folder, metric_logger=build_metric_logger(cfg))
        self.writer = CheckpointWriter(self.folder, keep_last=cfg.keep_last)
        notes = [f"note: {note}" for note in [*self.warnings, *self.data.ledger["notes"]]]
        print("\n".join([*lines, *notes]))

    def _setup_validator(self) -> None:
        self.validator = Validator(
            model=self.model,
            tokenizer=self.tokenizer,
            validation=self.validation,
            rows=self.data.validation.take(self.validation.rows),
            prompts=broadcast_from_main(self.prompts),
            forgetting=self.forgetting,
            tokens_per_pass=self.spec.tokens_per_pass,
            max_seq_len=self.cfg.max_seq_len,
            world=self.world,
            is_sharded=self.parallel == "shard",
            record=self.record,
        )

    def train(self) -> None:
        """Run all epochs and save checkpoints. After a signal, or a non-finite step not skipped, save and stop."""
        saving = save_when_stopped(self._save_checkpoint, self.writer, self.record)
        with StopSignals(show=self.world.is_main) as self.stop, saving:
            self._train_epochs()

    def _train_epochs(self) -> None:
        self.model.train()
        at, num_steps = self.progress, self.num_steps
        save_every = self.cfg.save_every_n_steps or math.ceil(num_steps / 20)
        is_quiet = not self.world.is_main
        with tqdm(total=num_steps, initial=at.step, unit="step", disable=is_quiet, dynamic_ncols=True) as bar:
            self.validate()  # before training, or the validation that a resumed run has still to do
            while not self._is_over():
                for indices in self.plan_epoch(at.epoch)[at.step_in_epoch :]:
                    record = self._train_step(indices)
                    if self.world.is_main:
                        self.writer.raise_if_failed()
                        self.record.write_step(record, bar)
                    if at.step_in_epoch == self.steps_per_epoch:
                        at.finish_epoch()
                    self.validate()
                    if at.step % save_every == 0 or at.step_in_epoch == 0 or self._is_over():
                        self._save_checkpoint()
                    if self._is_over():
                        break

    def _is_over(self) -> bool:
        return self.progress.is_over(self.cfg.epochs, patience=self.cfg.early_stopping_patience)

    def _train_step(self, indices: list[int]) -> TrainingStep:
        """Take one optimizer step on this rank's rows. Return its record for metrics.jsonl."""
        started = time.perf_counter()
        rows = [self.data.sequences[index] for index in indices]
        layout = lay_out_passes(self.lengths[indices].tolist(), tokens_per_pass=self.spec.tokens_per_pass)
        passes = [[rows[index] for index in one] for one in layout]
        counts = count_step(passes)
        loss, position_losses = accumulate_gradients(
            self.model, self.adapter_params, passes, counts, world=self.world, stop=self.stop
        )
        grad_norm = compute_grad_norm(self.adapter_params, clip_to=self.cfg.clip_grad_norm)
        record = {"step": self.progress.step + 1, "epoch": self.progress.epoch}
        problem = find_nonfinite(loss, grad_norm)
        if self.progress.step == 0:
            refuse_damaged_base(loss, self.cfg.base_dir, self.world)
        if problem is None:
            record |= {"loss": loss, "lr": float(self.schedule.get_last_lr()[0]), "grad_norm": grad_norm}
            self.optimizer.step()
        else:
            record["skipped"] = skip_step(
                record["step"],
                problem,
                passes,
                position_losses,
                on_nonfinite=self.cfg.on_nonfinite,
                base_dir=self.cfg.base_dir,
                world=self.world,
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.progress.finish_step()
        self.random_state = capture_random_state(self.world.device)
        record |= counts.measure_speed(time.perf_counter() - started)
        return TrainingStep(**record, peak_memory_bytes=measure_peak(self.world.device))

    def validate(self) -> None:
        """If due, measure the validation loss and answer the prompts. Save the adapter of the lowest loss as best/."""
        at, is_epoch_end = self.progress, self.progress.step_in_epoch == 0
        if not self.validation.is_due(at.step, is_epoch_end=is_epoch_end):
            return
        if at.validated_step != at.step:
            loss = self.validator.measure(at, before_pass=self.stop.raise_if_requested)
            if loss is not None and at.step == 0:
                refuse_damaged_base(loss, self.cfg.base_dir, self.world)
            if loss is not None and at.step > 0 and at.take_loss(loss):
                at.best_sha256 = self._save_adapter("best")
            at.validated_step = at.step
            if loss is not None and self.record is not None:
                learned = compute_learned_share(self.schedule, at.step, self.num_steps)
                self.record.show_outlook(num_steps=self.num_steps, learned=learned)
        if (is_epoch_end or self._is_over()) and at.sampled_step != at.step:
            self.validator.answer(at, after_token=self.stop.raise_if_requested)
            at.sampled_step = at.step
        self.validator.show()

    def save(self) -> None:
        """Write the final adapter as last/. Print the verdict and the next command."""
        with agree_on_errors():
            if self.world.is_main:
                check_learned(self.folder)
        self._save_adapter("last")
        self._score_general_prompts()
        if self.world.is_main:
            print(f"wrote {self.folder}; its GGUF: {format_script('export', self.folder)}")
            print("\n".join([*self.progress.describe_end(self.cfg.epochs), *self.record.conclude()]))
        wait_for_all()
        stop_world()

    def _score_general_prompts(self) -> None:
        """Load the adapter that will be exported into the model, and measure its forgetting."""
        at, name = self.progress, "last" if self.progress.best_step is None else "best"
        if self.forgetting.prompts and name == "best" and at.best_step != at.step:
            architecture = read_architecture(self.cfg.base_dir)
            best = read_adapter_weights(self.folder / name, architecture) if self.world.is_main else None
            restore_adapter(self.model, broadcast_from_main(best))
        self.validator.score_general_prompts(name)

    def _save_adapter(self, name: str) -> str | None:
        return save_adapter(self.folder / name, *self.collect_adapter()) if self.world.is_main else None

    def _save_checkpoint(self) -> None:
        """Start to write a checkpoint of the last whole step."""
        random_states = gather_over_ranks(self.random_state)
        if self.world.is_main:
            adapter, adapter_config = self.collect_adapter()
            state = {"optimizer": copy_to_cpu(self.optimizer.state_dict()["state"]), "random": random_states}
            progress = {**vars(self.progress), "recorded_bytes": self.record.sync(), "run": self.run}
            self.writer.start(self.progress.step, Checkpoint(adapter, adapter_config, state, progress))


def recipe_main() -> None:
    """Run the recipe. A user's mistake ends with one message and exit code 1, before anything slow if possible."""
    print_in_any_encoding()
    with end_together(), ExitStack() as held:
        with agree_on_errors():
            cfg = load_config(sys.argv[1:])
            warnings = check_config(cfg)
            if is_main_process():
                held.enter_context(hold_run_folder(cfg.output_dir))
        recipe = LoRAFinetuneRecipe(cfg, warnings)
        recipe.setup()
        with explain_out_of_memory(recipe.spec, recipe.device):
            recipe.train()
        recipe.save()


if __name__ == "__main__":
    recipe_main()
