"""One epoch of Unsloth's training for gpu_user.py, and its model for gpu.py, in a process with packages of its own.

FastLanguageModel and trl's SFTTrainer as in Unsloth's notebooks, without a network. Rows come tokenized, because every
side must train on the same ids and labels. PYTHONPATH must have Unsloth's packages and no torchao older than 0.16,
which peft refuses. These packages ran on torch 2.11 with CUDA 13 and transformers 5.17: unsloth and unsloth_zoo
2026.10.9, trl 1.15.0, datasets 4.8.5, bitsandbytes 0.50.2, cut_cross_entropy 25.1.1, msgspec 0.22.0.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPECIAL_TOKENS = {"bos": "<|begin_of_text|>", "end": "<|end_of_text|>", "eos": "<|eot_id|>", "pad": "<|pad|>"}
CHECKPOINTING = {"unsloth": "unsloth", "true": True, "false": False}


def make_environment(site: Path, work: Path) -> dict[str, str]:
    """Return the environment of a process that uses the packages in `site` and no network."""
    return os.environ | {
        "PYTHONPATH": str(site),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(work / "hf"),
        "UNSLOTH_DISABLE_STATISTICS": "1",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # Unsloth's own; it must be set before torch is imported
        "UNSLOTH_COMPILE_LOCATION": str(work / "unsloth_compiled_cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def link_base(base_dir: Path, folder: Path) -> Path:
    """Return a folder with the base's weights and a tokenizer of 260 tokens: Unsloth needs one, but tokenizes nothing.

    The config's special ids are set to the tokenizer's.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in base_dir.glob("model*.safetensors*"):
        (folder / path.name).symlink_to(path.resolve())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {f"{name}_token_id": tokenizer.token_to_id(SPECIAL_TOKENS[name]) for name in ("bos", "eos", "pad")}
    config = json.loads((base_dir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | ids))
    (folder / "generation_config.json").write_text(json.dumps(ids))
    tokens = {f"{name}_token": SPECIAL_TOKENS[name] for name in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 131_072, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def load_model(folder: Path, *, kind: str, rank: int, alpha: float, max_seq_len: int, checkpointing: bool | str):
    """Return a model with an adapter on all linear layers, without dropout, and its tokenizer.

    Args:
        folder: written by link_base()
        kind: lora | qlora
        checkpointing: "unsloth" offloads the checkpointed activations to host memory; True is torch's own
    """
    from unsloth import FastLanguageModel  # first import: it changes transformers, peft and trl

    import torch  # isort: skip

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(folder),
        max_seq_length=max_seq_len,
        dtype=torch.bfloat16,
        load_in_4bit=kind == "qlora",
        use_exact_model_name=True,
        fix_tokenizer=False,
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0,
        target_modules=TARGETS,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=42,
    )
    return model, tokenizer


def make_trainer(model, tokenizer, rows: list[dict], log: Path, arguments: argparse.Namespace):
    """Return trl's SFTTrainer on tokenized rows, with Unsloth's default, padding-free batches."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Log(TrainerCallback):
        """Writes a line per step, like torchtune's recipe."""

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if "loss" in logs:
                peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
                with log.open("a") as file:
                    file.write(f"Step {state.global_step} | loss:{logs['loss']} peak_memory_active:{peak}\n")

    config = SFTConfig(
        output_dir=str(log.parent / "trainer"),
        per_device_train_batch_size=arguments.batch,
        gradient_accumulation_steps=arguments.accumulation,
        num_train_epochs=1,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        optim=arguments.optimizer,
        max_grad_norm=1.0,
        bf16=True,
        seed=42,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=arguments.max_seq_len,
        # If they were prepared again, rows with labels would get another collator, which pads.
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    data = Dataset.from_dict(
        {"input_ids": [row["tokens"] for row in rows], "labels": [row["labels"] for row in rows]},
    )
    # Unsloth pads rows unless they are marked as cut.
    assert max(len(row["tokens"]) for row in rows) <= arguments.max_seq_len
    data._unsloth_truncated_to = arguments.max_seq_len
    return SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Log()])


def describe_attention() -> str:
    """Return the attention backend of padding-free batches. It is printed to show a silent fallback."""
    from unsloth.utils import attention_dispatch

    return attention_dispatch.select_attention_backend(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-dir", required=True, type=Path)
    parser.add_argument("--rows", required=True, type=Path, help="a JSON list of {tokens, labels}")
    parser.add_argument("--kind", required=True, choices=["lora", "qlora"])
    parser.add_argument("--batch", required=True, type=int)
    parser.add_argument("--accumulation", required=True, type=int)
    parser.add_argument("--checkpointing", required=True, choices=CHECKPOINTING)
    parser.add_argument("--optimizer", required=True, help="the notebooks use adamw_8bit")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--alpha", required=True, type=float)
    parser.add_argument("--learning-rate", required=True, type=float)
    parser.add_argument("--warmup-steps", required=True, type=int)
    parser.add_argument("--max-seq-len", required=True, type=int)
    parser.add_argument("--log", required=True, type=Path)
    arguments = parser.parse_args()
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(
        link_base(arguments.base_dir, arguments.log.parent / "base"),
        kind=arguments.kind,
        rank=arguments.rank,
        alpha=arguments.alpha,
        max_seq_len=arguments.max_seq_len,
        checkpointing=CHECKPOINTING[arguments.checkpointing],
    )
    trainer = make_trainer(model, tokenizer, json.loads(arguments.rows.read_text()), arguments.log, arguments)
    collator = trainer.data_collator
    if not getattr(collator, "padding_free", False):
        raise SystemExit(f"Unsloth would pad: its collator is {collator}")
    print(f"attention without padding: {describe_attention()}", flush=True)
    trainer.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"trained {sum(weight.numel() for weight in parameters)} parameters in {parameters[0].dtype}")


if __name__ == "__main__":
    main()
