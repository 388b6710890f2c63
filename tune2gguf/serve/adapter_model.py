"""The trained model in torch, base and unmerged adapter, with the chat method of an exported model."""

from __future__ import annotations

import torch

from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.load import load_base
from tune2gguf.export.merge.adapter import Adapter, read_adapter
from tune2gguf.machine.spinning import share_cores
from tune2gguf.model.caches import KVCaches
from tune2gguf.model.generate import AdapterModel
from tune2gguf.model.llama import LORA_ATTN_MODULES, CausalLM, lora_llama
from tune2gguf.model.lora import LoRALinear
from tune2gguf.runs.run import Run
from tune2gguf.tokenizer.tokenizer import load_tokenizer


def load_adapter_model(run: Run) -> AdapterModel:
    """Load a run's model with load_trained_model, and set up KV caches for one conversation."""
    model, device = load_trained_model(run)
    caches = KVCaches(model, batch_size=1, num_places=run.max_seq_len, device=device)
    tokenizer = load_tokenizer(run.base_dir, chat_template=run.chat_template.name)
    return AdapterModel(caches, tokenizer, run.max_seq_len, device)


def load_trained_model(run: Run) -> tuple[CausalLM, torch.device]:
    """Load a run's base, in the precision of the training, and its adapter; on a GPU if there is one.

    Raises:
        ValueError: if base or adapter are missing or do not fit together
    """
    share_cores(torch.get_num_threads())
    adapter = read_adapter(run.adapter_dir, open_base(run.base_dir).specs)
    parts = {name.split(".", 2)[2].removesuffix(".weight") for name in adapter.pairs}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = lora_llama(
        str(run.base_dir),
        architecture=None,
        lora_rank=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        lora_attn_modules=[name for name in LORA_ATTN_MODULES if f"attn.{name}" in parts],
        apply_lora_to_mlp=any(name.startswith("mlp.") for name in parts),
        max_seq_len=run.max_seq_len,
    )
    load_base(model, str(run.base_dir), device=device, base_weights=run.base_weights, show=True)
    _fill_adapter(model, adapter)
    return model.eval(), device


def _fill_adapter(model: CausalLM, adapter: Adapter) -> None:
    with torch.no_grad():
        for name, module in model.decoder.named_modules():
            if isinstance(module, LoRALinear):
                pair = adapter.pairs.get(f"{name}.weight")
                if pair is None:
                    module.lora_a.weight.zero_()
                    module.lora_b.weight.zero_()
                else:
                    module.lora_a.weight.copy_(torch.from_numpy(pair.lora_a))
                    module.lora_b.weight.copy_(torch.from_numpy(pair.lora_b))
