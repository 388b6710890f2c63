"""The kernels of tune2gguf.model.fused, run by Triton's interpreter on a CPU.

The reference is torchtune's layer with autograd, in float32: any difference is an error.
"""

import dataclasses
from functools import partial

import pytest
import torch
from torch.nn import functional
from torchtune.modules import FeedForward

from tests.conftest import INTERPRETS_TRITON, TINY_TIED
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.llama import CausalLM, build_lora_llama, make_row_mask, prepare_training
from tune2gguf.model.nf4 import quantize_nf4
from tune2gguf.model.nf4_tensor import pack_nf4

pytest.importorskip("triton")
if not INTERPRETS_TRITON:
    pytest.skip("with a CUDA device tests/gpu runs the kernels themselves", allow_module_level=True)

from tune2gguf.model.fused import MAX_GRAPHED_TOKENS, cudnn, describe_layers, launch, pad_length, why_not_fused
from tune2gguf.model.fused.attention import Layout
from tune2gguf.model.fused.graphs import pad_rows
from tune2gguf.model.fused.groups import get_projections, list_adapted
from tune2gguf.model.fused.launch import Adapted, Dropout
from tune2gguf.model.fused.layer import run_layer
from tune2gguf.model.fused.stack import lay_out_pass

pytestmark = pytest.mark.slow

# Widths and ranks are no multiples of a tile.
SHAPE = Architecture(**{**vars(TINY_TIED), "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 72})
SHAPE = dataclasses.replace(SHAPE, head_dim=16, intermediate_dim=136)
ALL = ["q_proj", "k_proj", "v_proj", "output_proj"]


def make_model(dropout: float, modules: list[str], apply_to_mlp: bool, *, num_layers: int = 1) -> CausalLM:
    model = build_lora_llama(
        dataclasses.replace(SHAPE, num_layers=num_layers),
        lora_rank=5,
        lora_alpha=8.0,
        lora_dropout=dropout,
        lora_attn_modules=modules,
        apply_lora_to_mlp=apply_to_mlp,
        max_seq_len=64,
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def make_layer(dropout: float, modules: list[str], apply_to_mlp: bool):
    return make_model(dropout, modules, apply_to_mlp).decoder.layers[0]


def make_seed(seed: int) -> torch.Tensor:
    return torch.tensor([seed], dtype=torch.int32)


def make_layout(*lengths: int) -> Layout:
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Layout(torch.cat([torch.arange(length) for length in lengths]), starts, max(lengths))


def draw_mask(num_rows: int, width: int, dropout: Dropout) -> torch.Tensor:
    """Return dropout's factor for each element."""
    ones = Adapted(torch.ones(num_rows, 1), torch.ones(1, width), dropout)
    return launch.add(torch.zeros(num_rows, width), ones, factor_is_a=True)


def compute_reference(layer, x: torch.Tensor, layout: Layout, dropouts: dict[str, Dropout]) -> torch.Tensor:
    """Run torchtune's layer with the kernels' dropout masks and a dense attention mask within rows."""

    def drop_as_drawn(name: str):
        linear = get_projections(layer)[name]

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            rows = inputs.reshape(-1, inputs.shape[-1])
            dropped = rows * draw_mask(*rows.shape, dropouts[name]) if dropouts else rows
            out = rows @ linear.weight.T
            out = out + dropped @ linear.lora_a.weight.T @ linear.lora_b.weight.T * linear.scaling
            return out.view(*inputs.shape[:-1], -1)

        return forward

    adapted = list_adapted(get_projections(layer))
    for name in adapted:
        get_projections(layer)[name].forward = drop_as_drawn(name)
    # On a CPU our projections of one input share a mask; here each draws its own.
    layer.mlp.forward = partial(FeedForward.forward, layer.mlp)
    out = layer(x[None], mask=make_row_mask(layout.starts, 1, len(x)), input_pos=layout.positions[None])[0]
    del layer.mlp.forward
    for name in adapted:
        del get_projections(layer)[name].forward
    return out


def take_gradients(layer, x: torch.Tensor, out: torch.Tensor) -> dict[str, torch.Tensor]:
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    layer.zero_grad()
    x.grad = None
    out.backward(upstream)
    gradients = {name: weight.grad for name, weight in layer.named_parameters() if weight.grad is not None}
    return gradients | {"x": x.grad, "out": out.detach()}


def measure_worst_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[name] - value).norm() / value.norm()).item() for name, value in expected.items())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize(
    "dropout, modules, apply_to_mlp",
    [(0.0, ALL, True), (0.3, ALL, True), (0.0, ["q_proj", "v_proj"], False), (0.3, ["k_proj"], True)],
    ids=["all", "all-dropped", "q-v", "k-mlp-dropped"],
)
def test_a_fused_layer_has_the_output_and_gradients_of_torchtunes(dropout, modules, apply_to_mlp, checkpointing):
    layer = make_layer(dropout, modules, apply_to_mlp)
    x = torch.randn(80, SHAPE.embed_dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layout = make_layout(25, 38, 0, 17)
    seeds = torch.arange(16, dtype=torch.int32).view(4, 4) + 5 if dropout else None
    fused = run_layer(layer, x, layout=layout, seeds=seeds, checkpointing=checkpointing)
    found = take_gradients(layer, x, fused)
    slots = {"q_proj": (0, 0), "k_proj": (0, 1), "v_proj": (0, 2), "output_proj": (1, 0), "w1": (2, 0), "w3": (2, 1)}
    slots["w2"] = (3, 0)
    if modules == ["k_proj"]:
        slots["k_proj"] = (0, 0)
    adapted = list_adapted(get_projections(layer))
    dropouts = {name: Dropout(seeds[slots[name]].view(1), dropout) for name in adapted} if dropout else {}
    expected = take_gradients(layer, x, compute_reference(layer, x, layout, dropouts))
    assert measure_worst_error(found, expected) < 2e-6
    # Negative control: other masks, or other rows.
    for other in ({"seeds": seeds + 1},) if dropout else ({"layout": make_layout(26, 37, 17)},):
        out = run_layer(layer, x, **{"layout": layout, "seeds": seeds, "checkpointing": checkpointing} | other)
        assert measure_worst_error(take_gradients(layer, x, out), expected) > 1e-2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_a_fused_model_has_the_losses_and_gradients_of_torchtunes_for_rows_and_packs(checkpointing):
    plain, fused = (make_model(0.0, ALL, True, num_layers=2) for _ in range(2))
    prepare_training(fused, compile=False, enable_activation_checkpointing=checkpointing, fuse=True)
    tokens = torch.randint(0, SHAPE.vocab_size, (2, 30), generator=torch.Generator().manual_seed(1))
    packed = {
        "row_starts": torch.tensor([0, 12, 30, 30, 47, 60], dtype=torch.int32),
        "longest_row": 18,
        "input_pos": torch.cat([torch.arange(length) for length in (12, 18, 17, 13)]).view(2, 30),
    }
    for rows in ({}, packed):
        outcomes = []
        for model in (plain, fused):
            model.zero_grad()
            losses = model(tokens, tokens, **rows)
            losses.sum().backward()
            gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
            outcomes.append(gradients | {"losses": losses.detach(), "hidden": model.compute_hidden(tokens, **rows)})
        assert measure_worst_error(outcomes[1], outcomes[0]) < 5e-6


def test_seeds_of_a_pass_are_those_that_each_layer_would_draw():
    model = make_model(0.1, ["q_proj", "v_proj"], True, num_layers=3)
    prepare_training(model, compile=False, enable_activation_checkpointing=False, fuse=True)
    torch.manual_seed(5)
    seeds = model.stack.draw_seeds(torch.device("cpu"))
    torch.manual_seed(5)
    for layer in seeds:
        draws = torch.randint(2**31 - 1, (5,)).tolist()
        assert [*layer[0, :2], *layer[2, :2], layer[3, 0]] == draws
    assert torch.count_nonzero(seeds) == 15


def test_dropout_of_a_pass_follows_torchs_seed():
    model = make_model(0.3, ALL, True)
    prepare_training(model, compile=False, enable_activation_checkpointing=False, fuse=True)
    tokens = torch.arange(20)[None]
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(tokens, tokens).detach())
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])
    losses = [model.eval()(tokens, tokens).detach() for _ in range(2)]
    assert torch.equal(*losses), "nothing is dropped where nothing is trained"


def test_passes_are_padded_to_few_lengths_and_rows():
    lengths = [pad_length(number) for number in range(1, MAX_GRAPHED_TOKENS + 1)]
    assert all(length >= number for number, length in enumerate(lengths, start=1))
    assert len(set(lengths)) == 24 and max(lengths) == MAX_GRAPHED_TOKENS
    assert [pad_length(number) for number in (1, 128, 1025, 2049, 4097, 8193)] == [128, 128, 1280, 2560, 4608, 8320]
    assert [pad_rows(number, has_padding=True) for number in (1, 2, 3, 4, 5, 8, 9)] == [2, 3, 5, 5, 9, 9, 17]
    assert [pad_rows(number, has_padding=False) for number in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_padding_of_a_pass_is_a_row_of_its_own_and_further_rows_are_empty():
    tokens = torch.tensor([[5, 6, 7], [8, 9, 1]])
    flat, layout = lay_out_pass(tokens, row_starts=None, longest_row=None, input_pos=None)
    assert flat.tolist() == [5, 6, 7, 8, 9, 1] + [0] * 122
    assert layout.positions.tolist() == [0, 1, 2, 0, 1, 2] + [0] * 122
    assert layout.starts.tolist() == [0, 3, 6, 128] and layout.longest == 128
    starts = torch.tensor([0, 1, 2, 6], dtype=torch.int32)
    _, layout = lay_out_pass(tokens, row_starts=starts, longest_row=4, input_pos=torch.zeros(2, 3).long())
    assert layout.starts.tolist() == [0, 1, 2, 6, 128, 128] and layout.starts.dtype == torch.int32
    long = torch.zeros(1, MAX_GRAPHED_TOKENS + 100, dtype=torch.long)
    starts = torch.tensor([0, 4000, MAX_GRAPHED_TOKENS + 100], dtype=torch.int32)
    flat, layout = lay_out_pass(long, row_starts=starts, longest_row=4292, input_pos=long)
    assert layout.starts.tolist() == [0, 4000, 8292, len(flat)] and layout.longest == 4292
    some = torch.zeros(1, 3000, dtype=torch.long)
    for longest, bound in ((1023, 3072), (1500, 2048), (2049, 3072)):
        starts = torch.tensor([0, longest, 3000], dtype=torch.int32)
        _, layout = lay_out_pass(some, row_starts=starts, longest_row=longest, input_pos=some)
        assert layout.longest == bound and layout.is_long == (longest >= 1024), "few bounds for graphs to share"


def test_an_adapter_below_the_last_bit_breaks_no_ties():
    """Biased rounding would shift all sums of projections by the adapter's sign.

    The test runs in float16: the interpreter has no bf16 products.
    """
    layer = make_layer(0.0, ALL, True).to(torch.float16)
    x = torch.randn(40, SHAPE.embed_dim, generator=torch.Generator().manual_seed(1)).half()
    outputs = []
    for size in (0.0, 1.2e-7, 1e-2):
        for name in ("output_proj", "w2"):
            get_projections(layer)[name].lora_b.weight.data.fill_(size)
        with torch.no_grad():
            outputs.append(run_layer(layer, x, layout=make_layout(len(x))))
    without, tiny, small = outputs
    assert (tiny != without).float().mean() < 0.001
    assert (small != without).float().mean() > 0.5, "negative control"


def test_a_layer_that_will_not_go_back_keeps_no_graph_and_drops_nothing():
    layer = make_layer(0.3, ALL, True).eval()
    x = torch.randn(20, SHAPE.embed_dim)
    with torch.no_grad():
        out = run_layer(layer, x, layout=make_layout(len(x)))
        expected = layer(x[None])[0]
    assert not out.requires_grad
    assert torch.allclose(out, expected, atol=1e-5)


def test_masks_drop_the_share_that_they_are_to_drop_and_differ_by_seed():
    first, second = (draw_mask(500, 300, Dropout(make_seed(seed), 0.1)) for seed in (1, 2))
    # The standard deviation of the share over 150 000 draws is 0.0008.
    for mask in (first, second):
        assert (mask == 0).float().mean().item() == pytest.approx(0.1, abs=0.004)
        assert mask.max().item() == pytest.approx(1 / 0.9)
    both = ((first == 0) & (second == 0)).float().mean().item()
    assert both == pytest.approx(0.01, abs=0.0015), "masks of two seeds are independent"
    rows = (first == 0).float()
    neighbours = (rows[:, 1:] * rows[:, :-1]).mean().item()
    assert neighbours == pytest.approx(0.01, abs=0.0015), "and so are neighbours"


def test_cross_entropy_and_its_gradient_are_torchs(monkeypatch):
    monkeypatch.setattr(launch, "CROSS_ENTROPY_BLOCK", 256)
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 10
    targets = torch.tensor([0, 999, 500, 255, 256])
    leaf = logits.clone().requires_grad_()
    expected = functional.cross_entropy(leaf, targets, reduction="none")
    expected.sum().backward()
    losses = torch.empty(5)
    launch.cross_entropy(logits, targets, losses, with_gradient=True)
    assert torch.allclose(losses, expected, atol=1e-5)
    assert torch.allclose(logits, leaf.grad, atol=1e-6)


def test_dequantized_nf4_is_that_of_the_cpu_bit_for_bit():
    weight = pack_nf4(quantize_nf4(torch.randn(64, 320, generator=torch.Generator().manual_seed(0))))
    parts = (weight.codes, weight.scales, weight.factors, weight.offset, weight.table)
    found = launch.dequantize_nf4(*parts, dtype=torch.float32)
    assert torch.equal(found.view(64, 320), weight.dequantize(torch.float32))


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"device_type": "cpu"}, "device=cpu"),
        ({"compile": True}, "compile=true"),
        ({"dtype": "fp32"}, "dtype=fp32"),
        ({"lora_rank": 129}, "lora_rank=129 is above 128"),
        ({"lora_rank": 128}, None),
        ({"head_dim": 80}, "head_dim=80 is not a power of two up to 256"),
        ({"head_dim": 96}, "head_dim=96 is not a power of two up to 256"),
        ({"head_dim": 512}, "head_dim=512 is not a power of two up to 256"),
        ({"head_dim": 256}, None),
        ({"head_dim": 256, "lora_rank": 65}, "lora_rank=65 is above 64 with head_dim=256"),
    ],
)
def test_what_keeps_a_run_from_the_fused_layers_is_said(changed, reason):
    options = {"device_type": "cuda", "dtype": "bf16", "compile": False, "lora_rank": 16, "head_dim": 64} | changed
    architecture = dataclasses.replace(TINY_TIED, head_dim=options.pop("head_dim"))
    obstacle = why_not_fused(architecture=architecture, **options)
    assert obstacle == reason
    assert describe_layers(obstacle, longest_row=500) == "layers: " + (
        "fused kernels" if reason is None else f"torchtune's, not the fused ones ({reason})"
    )


@pytest.mark.parametrize(
    "rows, longest, groups, fits",
    [(8, 1024, 1, True), (2, 4096, 4, True), (1, 8192, 8, True), (1, 16384, 8, False)],
)
def test_cudnn_takes_the_heads_of_8b_in_groups_and_leaves_the_longest_rows(rows, longest, groups, fits):
    """2 bytes x rows x longest row^2 x heads of a group are at most 512 MiB."""
    q, k = (torch.empty(rows * longest, heads, 128, device="meta") for heads in (32, 8))
    shape = cudnn.Shape.of(q, k, num_rows=rows, longest=longest, is_backward=True)
    assert shape.groups == groups
    assert cudnn.fits(q, k, num_rows=rows, longest=longest) == fits
    assert cudnn.Shape.of(q, k, num_rows=rows, longest=longest, is_backward=False).groups == 1
