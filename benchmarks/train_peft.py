"""One training run with transformers and PEFT for train.py, in the simplest loop and a process of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import peft
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from tune2gguf.model.loss import IGNORED_LABEL


def load_model(arguments: argparse.Namespace) -> torch.nn.Module:
    """Return the base with an adapter on every linear layer of the decoder. PEFT keeps the adapter in float32."""
    # PEFT refuses the torchao version that torchtune's recipe needs, although plain LoRA does not use torchao.
    import peft.tuners.lora.torchao as peft_torchao

    peft_torchao.is_torchao_available = lambda: False
    options = {"dtype": torch.float32 if arguments.base_weights == "fp32" else torch.bfloat16}
    if arguments.base_weights == "nf4":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.base_dir, attn_implementation="sdpa", **options)
    model.config.use_cache = False
    config = peft.LoraConfig(
        r=arguments.rank, lora_alpha=arguments.alpha, lora_dropout=arguments.dropout, target_modules="all-linear"
    )
    return peft.get_peft_model(model, config).train()


def make_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Return rows for transformers, which shifts the labels itself. Right padding is masked."""
    tokens, labels = ([torch.tensor(row[name]) for row in rows] for name in ("tokens", "labels"))
    batch = {
        "input_ids": pad_sequence(tokens, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }
    if len({len(row) for row in tokens}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True)
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-dir", required=True, type=Path)
    parser.add_argument("--batches", required=True, type=Path)
    parser.add_argument("--base-weights", required=True, choices=["bf16", "fp32", "nf4"])
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--alpha", required=True, type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--learning-rate", required=True, type=float)
    parser.add_argument("--clip-grad-norm", required=True, type=float)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    batches = json.loads(arguments.batches.read_text())
    model = load_model(arguments)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.01)
    with arguments.out.open("w", encoding="utf-8") as log:
        for number, rows in enumerate(tqdm(batches), 1):
            loss = model(**make_batch(rows)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, arguments.clip_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            log.write(f"Step {number} | loss:{loss.item()}\n")
            log.flush()


if __name__ == "__main__":
    main()
