"""Fine-tune a Llama with LoRA: setup → train → save, on a CPU, one GPU or many.

tune run recipes/lora_finetune.py --config configs/llama3_2_1b/lora.yaml [key=value …]
tune run --nproc_per_node 2 recipes/lora_finetune.py --config …
"""

import sys
import time
from contextlib import nullcontext

try:
    import tune2gguf  # noqa: F401
except ModuleNotFoundError:
    sys.exit("tune2gguf is not installed in this Python. From the root of its checkout: pip install -e .")

from tune2gguf.config import build_component, check_config, check_plan, load_config


class LoRAFinetuneRecipe:
    """One run. Every process of it does the same, on its own rows; only the main one writes and talks."""

    def __init__(self, cfg) -> None:
        self.cfg = cfg

    def setup(self) -> None:
        """Bring rows, model, optimizer and run folder into being; whatever the user got wrong shows up here."""
        from tune2gguf.distributed import share_error, start_world

        self.world = start_world(self.cfg.device)
        error = None
        try:
            self._setup_data()
            self._setup_model()
        except ValueError as found:
            error = str(found)
        error = share_error(error)
        if error is not None:
            raise ValueError(error)
        self._setup_optimizer()
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
        self.num_training_steps = cfg.epochs * len(self.plan_epoch(0))
        check_plan(
            num_rows=len(self.data.sequences),
            rows_per_step=self.rows_per_step,
            num_training_steps=self.num_training_steps,
            warmup_steps=cfg.warmup_steps,
        )

    def _setup_model(self) -> None:
        from tune2gguf.checkpoints.load import load_base
        from tune2gguf.distributed import replicate
        from tune2gguf.lora import initialize_adapters
        from tune2gguf.models import prepare_training
        from tune2gguf.seeds import seed_dropout

        cfg = self.cfg
        self.model = build_component(cfg.model)
        load_base(
            self.model, cfg.base_dir, device=self.world.device, base_weights=cfg.base_weights, show=self.world.is_main
        )
        initialize_adapters(self.model, cfg.seed)
        prepare_training(
            self.model,
            compile=cfg.compile,
            enable_activation_checkpointing=cfg.enable_activation_checkpointing,
        )
        self.trained_model = replicate(self.model)
        seed_dropout(cfg.seed, rank=self.world.rank)

    def _setup_optimizer(self) -> None:
        self.adapter_params = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build_component(self.cfg.optimizer, self.adapter_params)
        self.schedule = build_component(
            self.cfg.lr_scheduler, self.optimizer, num_training_steps=self.num_training_steps
        )

    def _setup_run_folder(self) -> None:
        from tune2gguf.distributed import share_error
        from tune2gguf.runs import MetricsFile, create_run_folder

        error = None
        if self.world.is_main:
            try:
                self.folder = create_run_folder(
                    self.cfg.output_dir, self.cfg, data=self.data, device=str(self.world.device)
                )
                self.metrics = MetricsFile(self.folder / "metrics.jsonl")
            except ValueError as found:
                error = str(found)
        error = share_error(error)
        if error is not None:
            raise ValueError(error)
        if self.world.is_main:
            self._print_plan()

    def _print_plan(self) -> None:
        cfg, world = self.cfg, self.world
        trainable = sum(parameter.numel() for parameter in self.adapter_params)
        print(f"base: {cfg.base_dir} in {cfg.base_weights}, adapter: {trainable:,} float32 weights, on {world.device}")
        print(f"rows: {len(self.data.train)} to train on, {len(self.data.validation)} held out")
        if self.data.unit == "packs":
            print(f"packs: {len(self.data.sequences)} of {cfg.max_seq_len} tokens, {self.data.sequences.fill:.1%} full")
        for note in self.data.ledger["notes"]:
            print(f"note: {note}")
        print(
            f"{self.data.unit} per step: {cfg.batch_size} x {cfg.gradient_accumulation_steps} x {world.size}"
            f" = {self.rows_per_step} (batch x accumulation x processes); "
            f"{self.num_training_steps} steps in {cfg.epochs} epochs"
        )

    def train(self) -> None:
        """Run all epochs; validate before, after each epoch, and keep the adapter with the lowest held-out loss."""
        from tqdm import tqdm

        self.model.train()
        self.step, self.epoch, self.best_loss = 0, 0, float("inf")
        self.validate()
        bar = tqdm(total=self.num_training_steps, unit="step", disable=not self.world.is_main, dynamic_ncols=True)
        for epoch in range(self.cfg.epochs):
            for micro_batches in self.plan_epoch(epoch):
                record = self._train_step(micro_batches)
                if self.world.is_main:
                    self.metrics.write(record)
                    bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tokens/s")
                    bar.update()
            self.epoch = epoch + 1
            self.validate()
        bar.close()

    def _train_step(self, micro_batches: list[list[int]]) -> dict:
        """Take one optimizer step on this rank's rows; return what metrics.jsonl says of it."""
        from torch.nn.utils import clip_grad_norm_, get_total_norm

        from tune2gguf.steps import count_tokens, require_finite

        started = time.perf_counter()
        rows = [[self.data.sequences[index] for index in indices] for indices in micro_batches]
        tokens, supervised_tokens = count_tokens(rows, self.world)
        loss = self._accumulate_gradients(rows, supervised_tokens)
        require_finite(loss, step=self.step + 1, rows=[row for batch in rows for row in batch])
        gradients = [parameter.grad for parameter in self.adapter_params]
        if self.cfg.clip_grad_norm is None:
            grad_norm = get_total_norm(gradients)
        else:
            grad_norm = clip_grad_norm_(self.adapter_params, self.cfg.clip_grad_norm)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loss": loss,
            "lr": rate,
            "grad_norm": float(grad_norm),
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised_tokens / seconds,
        }

    def _accumulate_gradients(self, rows: list[list], supervised_tokens: int) -> float:
        """Add up the gradients of this rank's micro-batches, reduced over ranks once; return the step's mean loss."""
        import torch

        from tune2gguf.data import collate
        from tune2gguf.distributed import sum_over_ranks
        from tune2gguf.steps import make_empty_batch

        device = self.world.device
        summed_loss = torch.zeros((), dtype=torch.float64, device=device)
        # A rank without rows in the last group takes part in the reduction with gradients of zero.
        batches = [collate(batch, pad_id=self.tokenizer.pad_id) for batch in rows] or [make_empty_batch()]
        for number, batch in enumerate(batches, start=1):
            wait = self.world.size > 1 and number < len(batches)
            with self.trained_model.no_sync() if wait else nullcontext():
                losses = self.trained_model(**vars(batch.to(device)))
                # Divide by the count over all ranks, so that 2 x 4 rows equal 1 x 8; DDP then averages over ranks.
                (losses.sum() * (self.world.size / supervised_tokens)).backward()
            summed_loss += losses.detach().sum()
        return sum_over_ranks(summed_loss).item() / supervised_tokens

    def validate(self) -> None:
        """Measure the held-out loss; save the adapter as best/ if it is the lowest yet."""
        from tune2gguf.validate import compute_heldout_loss

        if not self.data.validation:
            return
        held_out = compute_heldout_loss(
            self.model,
            self.data.validation,
            batch_size=self.cfg.batch_size,
            pad_id=self.tokenizer.pad_id,
            world=self.world,
        )
        if not self.world.is_main:
            return
        print(f"step {self.step}: held-out loss {held_out.mean:.4f} on {len(held_out.row_sums)} rows")
        self.metrics.write(
            {
                "step": self.step,
                "epoch": self.epoch,
                "val_loss": held_out.mean,
                "val_rows": len(held_out.row_sums),
                "val_tokens": sum(held_out.row_tokens),
            }
        )
        if self.step > 0 and held_out.mean < self.best_loss:
            self.best_loss = held_out.mean
            self._save_adapter("best")

    def save(self) -> None:
        """Write the final adapter as last/."""
        from tune2gguf.distributed import stop_world, wait_for_all

        if self.world.is_main:
            self._save_adapter("last")
            print(f"wrote {self.folder}")
            print(f"next: python scripts/export.py {self.folder}")
        wait_for_all()
        stop_world()

    def _save_adapter(self, name: str) -> None:
        from tune2gguf.architectures import read_architecture
        from tune2gguf.checkpoints.adapter import collect_adapter, make_peft_config, save_adapter, to_peft_layout

        cfg = self.cfg
        weights = to_peft_layout(collect_adapter(self.model), read_architecture(cfg.base_dir))
        config = make_peft_config(
            weights,
            rank=cfg.lora_rank,
            alpha=cfg.lora_alpha,
            dropout=cfg.lora_dropout,
            base_model_name=cfg.base_source or cfg.base_dir,
        )
        save_adapter(self.folder / name, weights, config)


def recipe_main() -> None:
    """Run the recipe; a user's mistake ends in one message and exit code 1, before anything slow where possible."""
    try:
        cfg = load_config(sys.argv[1:])
        check_config(cfg)
        recipe = LoRAFinetuneRecipe(cfg)
        recipe.setup()
        recipe.train()
        recipe.save()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    recipe_main()
