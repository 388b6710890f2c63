"""Packing changes a forward pass's cost, not its losses and adapter gradients."""

import dataclasses

import pytest
import torch

from tests.conftest import make_conversations, write_rows
from tests.recipes.test_training import measure_difference, read_records, run_recipe
from tune2gguf.base.load import load_base
from tune2gguf.data import Batch, PreparedData, chat_dataset, collate
from tune2gguf.model.llama import CausalLM, lora_llama
from tune2gguf.tokenizer.tokenizer import load_tokenizer

MAX_SEQ_LEN = 512


@pytest.fixture(scope="module")
def model(tiny_base) -> CausalLM:
    model = lora_llama(
        str(tiny_base),
        architecture=None,
        lora_rank=4,
        lora_alpha=4.0,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        max_seq_len=MAX_SEQ_LEN,
    )
    load_base(model, str(tiny_base), device=torch.device("cpu"), base_weights="fp32", show=False)
    # With zero lora_b, half of the gradients would be zero.
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def data(tiny_base, tmp_path_factory) -> PreparedData:
    path = write_rows(tmp_path_factory.mktemp("rows") / "a.jsonl", make_conversations(24))
    tokenizer = load_tokenizer(tiny_base, chat_template="chatml")
    return chat_dataset(str(path), tokenizer=tokenizer, max_seq_len=MAX_SEQ_LEN, seed=0, packing=True)


def measure(model: CausalLM, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the losses of all supervised positions, and the gradients of their sum for the adapter."""
    model.zero_grad()
    losses = [model(**vars(batch)) for batch in batches]
    torch.cat(losses).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    return torch.cat(losses).detach(), gradients


def make_batches(data: PreparedData) -> tuple[list[Batch], list[Batch]]:
    """Return the packs in batches of two, and the same rows one by one in the same order."""
    packs = [data.sequences[index] for index in range(len(data.sequences))]
    packed = [collate(packs[start : start + 2]) for start in range(0, len(packs), 2)]
    return packed, [collate([row]) for pack in packs for row in pack.rows]


def test_packed_losses_and_gradients_equal_those_of_the_rows_alone(model, data):
    packed, alone = make_batches(data)
    assert len(packed) * 6 < len(alone), "several rows share a pack, and several packs a batch"
    losses, gradients = measure(model, packed)
    expected_losses, expected_gradients = measure(model, alone)
    assert losses.numel() == sum(data.train[index].num_supervised for index in range(len(data.train)))
    torch.testing.assert_close(losses, expected_losses, atol=1e-5, rtol=0)
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 1e-5 * largest, name


def test_a_step_on_packs_is_the_step_on_their_rows(run_arguments, tmp_path, monkeypatch):
    """All 20 rows in one step of the recipe give the same adapter as rows and as packs."""
    losses = {}
    for name, batch_size in {"rows": 20, "packs": 5}.items():
        options = [f"batch_size={batch_size}", "gradient_accumulation_steps=1", "max_seq_len=400"]
        packing = f"dataset.packing={str(name == 'packs').lower()}"
        run_recipe([*run_arguments, *options, packing, f"output_dir={tmp_path / name}"], monkeypatch)
        [record] = read_records(tmp_path / name, "loss")
        losses[name] = record["loss"]
    assert losses["packs"] == pytest.approx(losses["rows"], abs=1e-6)
    assert measure_difference(tmp_path / "rows", tmp_path / "packs") < 1e-6


def test_rows_that_see_the_row_before_them_give_other_losses(model, data):
    """Negative control."""
    packed, alone = make_batches(data)
    packed = [batch for batch in packed if batch.row_starts is not None]
    assert packed and all(batch.row_starts is None for batch in alone)
    alone = alone[: sum(len(batch.row_starts) - 1 for batch in packed)]
    broken = [
        dataclasses.replace(batch, row_starts=torch.cat([batch.row_starts[:-1:2], batch.row_starts[-1:]]))
        for batch in packed
    ]
    expected, _ = measure(model, alone)
    assert (measure(model, broken)[0] - expected).abs().max() > 1e-2
