"""Compilation of the fused layers' kernels while the base loads. Each takes about a second the first time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import torch

from tune2gguf.base.layout import list_tensors
from tune2gguf.base.load import fill_model
from tune2gguf.machine.memory import RunSpec
from tune2gguf.model.llama import build_lora_llama

NUM_LAYERS = 2  # the first layer's input needs no gradient, the others' do
NUM_TOKENS = 256
VOCAB_SIZE = 64  # of the embedding, which has no kernel of ours


@contextmanager
def compile_kernels_meanwhile(
    spec: RunSpec, *, scaling: float, device: torch.device, show: bool = False
) -> Iterator[None]:
    """Compile the run's kernels in a thread and wait for them at the end. Does nothing if layers are not fused.

    Args:
        scaling: factor of the adapters' products, alpha / rank
        show: print a line if the kernels are not ready at the end
    """
    if spec.obstacle_to_fusing is not None:
        yield
        return
    with ThreadPoolExecutor(max_workers=1) as thread:
        compiled = thread.submit(compile_kernels, spec, scaling=scaling, device=device)
        yield
        if show and not compiled.done():
            print("compiling kernels; later runs reuse them", flush=True)
        compiled.result()


def compile_kernels(spec: RunSpec, *, scaling: float, device: torch.device) -> None:
    """Run zero-filled layers of the run's shape, forward and backward. Draws no random numbers, keeps no GPU memory."""
    from tune2gguf.model.fused.groups import GROUPS, SEEDS_PER_GROUP
    from tune2gguf.model.fused.launch import cross_entropy
    from tune2gguf.model.fused.layer import run_layer
    from tune2gguf.model.fused.stack import lay_out_pass

    torch.cuda.set_device(device)  # set per thread; the default is the first GPU
    shape = replace(spec.architecture, num_layers=NUM_LAYERS, vocab_size=VOCAB_SIZE)
    with torch.device("meta"):
        model = build_lora_llama(
            shape,
            lora_rank=spec.lora_rank,
            lora_alpha=scaling * spec.lora_rank,
            lora_dropout=spec.lora_dropout,
            lora_attn_modules=list(spec.lora_attn_modules),
            apply_lora_to_mlp=spec.apply_lora_to_mlp,
            max_seq_len=NUM_TOKENS,
        )
    weights = (
        (one.tune_name, torch.zeros(one.shape, dtype=torch.bfloat16, device=device)) for one in list_tensors(shape)
    )
    fill_model(model, weights, device=device, base_weights=spec.base_weights)
    seeds = torch.zeros(NUM_LAYERS, len(GROUPS), SEEDS_PER_GROUP, dtype=torch.int32, device=device)
    tokens = torch.zeros(1, NUM_TOKENS, dtype=torch.long, device=device)
    _, layout = lay_out_pass(tokens, row_starts=None, longest_row=None, input_pos=None)
    hidden = torch.zeros(NUM_TOKENS, shape.embed_dim, dtype=torch.bfloat16, device=device)
    for number, layer in enumerate(model.decoder.layers):
        one = seeds[number] if spec.lora_dropout > 0 else None
        hidden = run_layer(layer, hidden, layout=layout, seeds=one, checkpointing=spec.enable_activation_checkpointing)
    hidden.backward(torch.zeros_like(hidden))
    logits = torch.zeros(2, spec.architecture.vocab_size, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(2, dtype=torch.long, device=device)
    for with_gradient in (True, False):
        cross_entropy(logits, targets, torch.empty(2, device=device), with_gradient=with_gradient)
    torch.cuda.synchronize(device)
