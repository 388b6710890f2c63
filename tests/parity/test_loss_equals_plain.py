"""The loss over supervised positions equals the plain one, forward and backward, with every wrapper of the model.

Plain: logits of all positions, torch's cross entropy over the shifted labels, autograd's graph.
"""

import os
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.conftest import TINY_TIED
from tests.recipes.launch import CONTEXT, find_free_port
from tune2gguf.base.load import load_base
from tune2gguf.distributed.parallel import shard, sum_gradients
from tune2gguf.distributed.world import start_world
from tune2gguf.model.llama import CausalLM, lora_llama, prepare_training
from tune2gguf.model.lora import LoRALinear
from tune2gguf.model.loss import IGNORED_LABEL

BATCH, SEQ = 4, 24


def build(base: Path, *, base_weights: str = "fp32", parallel: str = "replicate", world=None) -> CausalLM:
    """Return the model with a nonzero adapter: no gradient is zero."""
    model = lora_llama(
        str(base),
        architecture=None,
        lora_rank=4,
        lora_alpha=4.0,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        max_seq_len=64,
    )
    if parallel == "shard":
        shard(model, world)
    load_base(model, str(base), device=torch.device("cpu"), base_weights=base_weights, show=False)
    generator = torch.Generator().manual_seed(0)
    for _, weight in list_adapter(model):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.train()


def list_adapter(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    named = [
        (name.replace("_checkpoint_wrapped_module.", "").removeprefix("module."), weight)
        for name, weight in model.named_parameters()
    ]
    return [(name, weight) for name, weight in named if weight.requires_grad]


def make_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and labels, [BATCH, SEQ]. Rows have different shares of supervised tokens."""
    tokens = torch.randint(0, TINY_TIED.vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    for row in range(BATCH):
        labels[row, : 5 * row] = IGNORED_LABEL
        labels[row, 20 + row // 2] = IGNORED_LABEL
    return tokens, labels


def compute_plainly(model: CausalLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute the mean loss and the adapter's gradients with plain operations on every position."""
    tokens, labels = make_rows()
    logits = functional.linear(run_plain_decoder(model, tokens), model.head_weight)
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL)
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in list_adapter(model)}


def run_plain_decoder(model: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Return the last hidden states, with every LoRA layer computed by its formula."""

    def compute(layer: LoRALinear, x: torch.Tensor) -> torch.Tensor:
        is_dense = type(layer.weight) is torch.nn.Parameter and layer.weight.dtype == torch.float32
        weight = layer.weight if is_dense else layer.weight.dequantize(torch.float32)
        return x @ weight.T + layer.scaling * x @ layer.lora_a.weight.T @ layer.lora_b.weight.T

    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    for layer in layers:
        layer.forward = lambda x, layer=layer: compute(layer, x)
    hidden = model.compute_hidden(tokens)
    for layer in layers:
        del layer.forward
    return hidden


def compute(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    losses = model(*make_rows())
    losses.mean().backward()
    return losses.mean().detach(), {name: weight.grad for name, weight in list_adapter(model)}


def assert_equal(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-6, rtol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, atol=1e-6, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_plain_ones(tiny_base, checkpointing):
    model = build(tiny_base)
    prepare_training(model, compile=False, enable_activation_checkpointing=checkpointing)
    assert_equal(compute(model), compute_plainly(build(tiny_base)))


def test_an_untied_head_gives_the_plain_loss(tiny_untied_base):
    assert_equal(compute(build(tiny_untied_base)), compute_plainly(build(tiny_untied_base)))


def test_a_4_bit_base_gives_the_plain_loss_of_its_dequantized_weights(wide_base):
    def build_exact() -> CausalLM:
        model = build(wide_base, base_weights="nf4")
        embedding = model.decoder.tok_embeddings
        embedding.weight.data = embedding.weight.data.float()  # computed in float32 from there on
        return model

    assert_equal(compute(build_exact()), compute_plainly(build_exact()))
    with pytest.raises(AssertionError, match="not close"):
        assert_equal(compute(build_exact()), compute_plainly(build(wide_base)))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "shard"])
def test_two_processes_with_a_part_of_the_rows_each_give_the_plain_loss(tiny_base, tmp_path, parallel):
    port, out = str(find_free_port()), tmp_path / "outcome.pt"
    processes = [CONTEXT.Process(target=compute_part, args=(tiny_base, parallel, rank, port, out)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_equal(torch.load(out), compute_plainly(build(tiny_base)))


def compute_part(base: Path, parallel: str, rank: int, port: str, out: Path) -> None:
    """Compute on every other row as one of two processes. Rank 0 writes the loss and gradients of all rows."""
    from tune2gguf.distributed.world import stop_world, sum_over_ranks

    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world = start_world("cpu")
    model = build(base, parallel=parallel, world=world)
    tokens, labels = make_rows()
    num_supervised = (labels[:, 1:] != IGNORED_LABEL).sum()
    losses = model(tokens[rank::2], labels[rank::2])
    (losses.sum() / num_supervised).backward()
    sum_gradients([weight for _, weight in list_adapter(model)], world)
    loss = sum_over_ranks(losses.detach().sum()) / num_supervised
    gradients = {name: weight.grad for name, weight in list_adapter(model)}
    if rank == 0:
        torch.save((loss, gradients), out)
    stop_world()


def test_no_graph_reaches_below_the_first_adapter(tiny_base):
    """Nothing before the first adapter needs a gradient, so backward multiplies no frozen weight there."""
    model, seen = build(tiny_base), {}

    def note(module, inputs, output) -> None:
        seen[names[module]] = (inputs[0].requires_grad, output.requires_grad)

    watched = ("tok_embeddings", "layers.0.sa_norm", "layers.0.mlp_norm", "layers.1.sa_norm")
    names = {model.decoder.get_submodule(name): name for name in watched}
    for module in names:
        module.register_forward_hook(note)
    compute(model)
    assert seen == {
        "tok_embeddings": (False, False),
        "layers.0.sa_norm": (False, False),
        "layers.0.mlp_norm": (True, True),
        "layers.1.sa_norm": (True, True),
    }


@pytest.mark.slow
def test_compiled_layers_give_the_plain_loss_and_two_graphs_serve_rows_of_every_length(tiny_base):
    """The first layer has its own graph, because its input needs no gradient; validation has one more."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = build(tiny_base)
    prepare_training(model, compile=True, enable_activation_checkpointing=False)
    assert_equal(compute(model), compute_plainly(build(tiny_base)))
    for batch, seq in [(2, 9), (3, 30), (2, 17), (5, 40)]:
        tokens = torch.randint(0, TINY_TIED.vocab_size, (batch, seq))
        model(tokens, tokens).mean().backward()
    assert counters["stats"]["unique_graphs"] == 2
    model.eval()
    with torch.no_grad():
        for batch, seq in [(2, 9), (3, 30)]:
            tokens = torch.randint(0, TINY_TIED.vocab_size, (batch, seq))
            torch.testing.assert_close(model(tokens, tokens), build(tiny_base)(tokens, tokens), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"] and not counters["unimplemented"]
