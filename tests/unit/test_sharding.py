"""A sharded base equals a whole one, and its layers are prefetched.

This process holds both processes' shards and reads them as GPUs of one machine read each other's.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.conftest import INTERPRETS_TRITON, TINY_TIED, TINY_UNTIED, write_tiny_base
from tests.gpu.models import CPU, Outcome, compute, list_adapter, make_batch, make_rows
from tune2gguf.base.load import load_base
from tune2gguf.model.llama import CausalLM, lora_llama, prepare_training
from tune2gguf.model.sharding import ShardedBase

pytestmark = pytest.mark.slow
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        name: write_tiny_base(folder / name, dataclasses.replace(shape, num_layers=NUM_LAYERS))
        for name, shape in (("tied", TINY_TIED), ("untied", TINY_UNTIED))
    }


class Reads:
    """A gather that reads both processes' shards; `events` records its starts and waits."""

    can_be_captured = False

    def __init__(self) -> None:
        self.other: ShardedBase | None = None
        self.events: list[tuple[str, int]] = []
        self.is_broken = False

    def connect(self, parts: list[torch.Tensor]):
        self._of_all = [parts, self.other.parts]
        return self

    def start(self, number: int, buffer: torch.Tensor):
        self.events.append(("gather", number))
        buffer.fill_(255)  # invalid until the wait
        return lambda: self._end(number, buffer)

    def _end(self, number: int, buffer: torch.Tensor) -> None:
        self.events.append(("wait", number))
        if not self.is_broken:
            buffer.copy_(torch.cat([parts[number] for parts in self._of_all]))


def make_model(base_dir: Path, base_weights: str, sharded: tuple[int, Reads] | None, **preparation) -> CausalLM:
    model = lora_llama(
        str(base_dir),
        architecture=None,
        lora_rank=4,
        lora_alpha=4.0,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        max_seq_len=64,
    )
    settings = {"compile": False, "enable_activation_checkpointing": False, "fuse": False} | preparation
    prepare_training(model, **settings)
    if sharded is not None:
        rank, reads = sharded
        model.sharded = ShardedBase(model.decoder, rank=rank, size=2, connect=reads.connect)
    load_base(model, str(base_dir), device=CPU, base_weights=base_weights, show=False)
    generator = torch.Generator().manual_seed(0)
    for _, weight in list_adapter(model):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return model.train()


def make_sharded(base_dir: Path, base_weights: str, **preparation) -> tuple[CausalLM, Reads]:
    """Return the first process's model and its gather."""
    reads = Reads()
    model = make_model(base_dir, base_weights, (0, reads), **preparation)
    reads.other = make_model(base_dir, base_weights, (1, Reads())).sharded
    return model, reads


def is_equal(found: Outcome, expected: Outcome) -> bool:
    pairs = [(found.losses, expected.losses), *((found.gradients[n], g) for n, g in expected.gradients.items())]
    return all(torch.equal(one, other) for one, other in pairs)


BATCH = make_batch(make_rows([12, 12]))
FUSED = pytest.param({"fuse": True}, marks=pytest.mark.skipif(not INTERPRETS_TRITON, reason="tests/gpu has it"))


@pytest.mark.parametrize("preparation", [{}, {"enable_activation_checkpointing": True}, FUSED], ids=str)
@pytest.mark.parametrize("base", ["tied", "untied"])
@pytest.mark.parametrize("base_weights", ["fp32", "bf16", "nf4"])
def test_a_split_base_has_the_losses_and_gradients_of_a_whole_one_bit_for_bit(bases, base, base_weights, preparation):
    if preparation.get("fuse") and base_weights != "fp32":
        pytest.skip("Triton's interpreter has no bf16 products")
    expected = compute(make_model(bases[base], base_weights, None, **preparation), BATCH)
    model, reads = make_sharded(bases[base], base_weights, **preparation)
    for _ in range(2):  # the second pass starts with layers gathered by the first
        assert is_equal(compute(model, BATCH), expected)
        with torch.no_grad():
            assert torch.equal(model.eval()(**vars(BATCH)), expected.losses)
        model.train()
    # Negative control: weights that are never gathered.
    reads.is_broken = True
    assert not is_equal(compute(model, BATCH), expected)


def test_each_process_keeps_half_of_the_matrices_and_two_layers_and_an_edge_for_all(bases):
    whole = make_model(bases["untied"], "fp32", None)
    matrices = [w for w in whole.parameters() if not w.requires_grad and w.dim() > 1]
    num_bytes = sum(weight.numel() * 4 for weight in matrices)
    model, _ = make_sharded(bases["untied"], "fp32")
    assert num_bytes / 2 <= sum(part.numel() for part in model.sharded.parts) < 1.1 * num_bytes / 2
    distinct = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in model.parameters()}
    adapter_and_norms = sum(w.numel() * 4 for w in whole.parameters() if w.requires_grad or w.dim() == 1)
    layer = sum(weight.numel() * 4 for weight in matrices[1:8])
    edge = matrices[0].numel() * 4
    assert 2 * layer + edge <= sum(distinct.values()) - adapter_and_norms < 1.1 * (2 * layer + edge)


def test_layers_arrive_while_the_one_before_them_computes_and_none_comes_twice_in_a_row(bases):
    model, reads = make_sharded(bases["untied"], "fp32")
    for number, layer in enumerate(model.decoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: reads.events.append(("forward", number)))
        layer.register_full_backward_hook(lambda *_, number=number: reads.events.append(("back", number)))
    compute(model, BATCH)
    del reads.events[:]
    compute(model, BATCH)
    embedding, head = NUM_LAYERS, NUM_LAYERS + 1
    assert reads.events == [
        *[("wait", embedding), ("gather", head)],  # the embedding was prefetched after the previous pass
        ("forward", 0),  # the next layer is still gathered from backward
        *[("gather", 2), ("forward", 1), ("wait", 2)],
        *[("gather", 3), ("forward", 2), ("wait", 3), ("forward", 3)],
        *[("wait", head), ("gather", embedding)],
        *[("back", 3), ("gather", 1), ("back", 2), ("wait", 1)],
        *[("gather", 0), ("back", 1), ("wait", 0), ("back", 0)],
    ]


def test_a_forward_pass_without_gradients_ends_by_calling_the_first_layer(bases):
    model, reads = make_sharded(bases["untied"], "fp32")
    with torch.no_grad():
        model(**vars(BATCH))
        del reads.events[:]
        model(**vars(BATCH))
    gathered = [number for what, number in reads.events if what == "gather" and number < NUM_LAYERS]
    assert gathered == [1, 2, 3, 0]


def test_graphs_of_all_layers_find_the_two_that_they_begin_with_and_gather_the_others(bases):
    """A graph captures the gathers of a pass; a replay after another pass must start from the same buffers."""
    model, reads = make_sharded(bases["untied"], "fp32")
    compute(model, BATCH)
    sharded, directions = model.sharded, ((False, range(NUM_LAYERS)), (True, reversed(range(NUM_LAYERS))))
    gathered = {}
    for backward, numbers in directions:
        sharded.begin_graph(backward=backward)
        del reads.events[:]
        for number in numbers:
            (sharded.go_back if backward else sharded.go_forward)(number)
        gathered[backward] = [number for what, number in reads.events if what == "gather"]
        # A graph must wait for every gather that it starts.
        assert gathered[backward] == [number for what, number in reads.events if what == "wait"]
    assert gathered == {False: [2, 3], True: [1, 0]}
    with torch.no_grad():  # at its end it prefetches the first layer
        model(**vars(BATCH))
    del reads.events[:]
    sharded.begin_graph(backward=False)
    sharded.end_graph(backward=False)
    sharded.begin_graph(backward=True)
    assert [number for what, number in reads.events if what == "gather"] == [1]
    sharded.end_graph(backward=True)
    assert len(reads.events) == 3
