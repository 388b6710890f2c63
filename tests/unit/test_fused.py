"""The kernels of tune2gguf.model.fused, run by Triton's interpreter on a CPU: what they compute, not how fast.

The reference is torchtune's layer with autograd; in float32, so that what differs is wrong.
"""

import dataclasses

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

from tests.conftest import INTERPRETS_TRITON, TINY_TIED
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.llama import build_lora_llama, make_block_mask, pad_packs
from tune2gguf.model.lora import LoRALinear
from tune2gguf.model.nf4 import dequantize_nf4_tensor, quantize_nf4

pytest.importorskip("triton")
if not INTERPRETS_TRITON:
    pytest.skip("with a CUDA device tests/gpu runs the kernels themselves", allow_module_level=True)

from tune2gguf.model.fused import describe_layers, launch, why_not_fused
from tune2gguf.model.fused.groups import get_projections
from tune2gguf.model.fused.launch import Adapted, Dropout
from tune2gguf.model.fused.layer import run_layer

# Widths that no tile divides, ranks that no tile has.
SHAPE = Architecture(**{**vars(TINY_TIED), "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 72})
SHAPE = dataclasses.replace(SHAPE, head_dim=16, intermediate_dim=136)
ALL = ["q_proj", "k_proj", "v_proj", "output_proj"]


def make_layer(dropout: float, modules: list[str], apply_to_mlp: bool):
    model = build_lora_llama(
        SHAPE,
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
    return model.decoder.layers[0].train()


def draw_mask(num_rows: int, width: int, dropout: Dropout) -> torch.Tensor:
    """Return what the dropout multiplies each element with."""
    ones = Adapted(torch.ones(num_rows, 1), torch.ones(1, width), dropout)
    return launch.add(torch.zeros(num_rows, width), ones, factor_is_a=True)


def compute_reference(layer, x: torch.Tensor, positions: torch.Tensor, dropouts: dict[str, Dropout]) -> torch.Tensor:
    """Run torchtune's layer, with the masks that the kernels draw."""

    def drop_as_drawn(name: str):
        linear = get_projections(layer)[name]

        def forward(inputs: torch.Tensor) -> torch.Tensor:
            rows = inputs.reshape(-1, inputs.shape[-1])
            dropped = rows * draw_mask(*rows.shape, dropouts[name]) if dropouts else rows
            out = rows @ linear.weight.T
            out = out + dropped @ linear.lora_a.weight.T @ linear.lora_b.weight.T * linear.scaling
            return out.view(*inputs.shape[:-1], -1)

        return forward

    adapted = [name for name, linear in get_projections(layer).items() if isinstance(linear, LoRALinear)]
    for name in adapted:
        get_projections(layer)[name].forward = drop_as_drawn(name)
    out = layer(x, input_pos=positions)
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
    x = torch.randn(2, 40, SHAPE.embed_dim, generator=torch.Generator().manual_seed(1)).requires_grad_()
    positions = torch.stack([torch.arange(40) % 25, torch.arange(40) % 17])
    torch.manual_seed(5)
    fused = run_layer(layer, x, mask=None, positions=positions, checkpointing=checkpointing)
    found = take_gradients(layer, x, fused)
    adapted = [name for name, linear in get_projections(layer).items() if isinstance(linear, LoRALinear)]
    torch.manual_seed(5)
    seeds = torch.randint(2**31 - 1, (len(adapted),)).tolist()
    dropouts = {name: Dropout(seed, dropout) for name, seed in zip(adapted, seeds, strict=True)} if dropout else {}
    expected = take_gradients(layer, x, compute_reference(layer, x, positions, dropouts))
    assert measure_worst_error(found, expected) < 2e-6
    # Negative control: other masks, or without dropout other positions.
    torch.manual_seed(6)
    other_positions = positions if dropout else positions * 2
    other = run_layer(layer, x, mask=None, positions=other_positions, checkpointing=checkpointing)
    assert measure_worst_error(take_gradients(layer, x, other), expected) > 1e-2


def test_an_adapter_below_the_last_bit_breaks_no_ties():
    """Else the sums that projections go into would be rounded in the direction of its sign, all of them.

    In float16: the interpreter has no products of bf16.
    """
    layer = make_layer(0.0, ALL, True).to(torch.float16)
    x = torch.randn(1, 40, SHAPE.embed_dim, generator=torch.Generator().manual_seed(1)).half()
    outputs = []
    for size in (0.0, 1.2e-7, 1e-2):
        for name in ("output_proj", "w2"):
            get_projections(layer)[name].lora_b.weight.data.fill_(size)
        with torch.no_grad():
            outputs.append(run_layer(layer, x, mask=None, positions=None, checkpointing=False))
    without, tiny, small = outputs
    assert (tiny != without).float().mean() < 0.001
    assert (small != without).float().mean() > 0.5, "negative control"


def test_a_layer_that_will_not_go_back_keeps_no_graph_and_drops_nothing():
    layer = make_layer(0.3, ALL, True).eval()
    x = torch.randn(1, 20, SHAPE.embed_dim)
    with torch.no_grad():
        out = run_layer(layer, x, mask=None, positions=None, checkpointing=False)
        expected = layer(x)
    assert not out.requires_grad
    assert torch.allclose(out, expected, atol=1e-5)


def test_masks_drop_the_share_that_they_are_to_drop_and_differ_by_seed():
    first, second = (draw_mask(500, 300, Dropout(seed, 0.1)) for seed in (1, 2))
    # Of 150 000 draws the share's standard deviation is 0.0008.
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
    weight = quantize_nf4(torch.randn(64, 320, generator=torch.Generator().manual_seed(0))).to_torchao()
    parts = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean)
    found = launch.dequantize_nf4(*parts, weight.nf4.float(), dtype=torch.float32)
    assert torch.equal(found.view(64, 320), dequantize_nf4_tensor(weight, torch.float32))


@pytest.mark.parametrize("seq", [96, 128, 300, 512])
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_a_block_mask_from_the_blocks_ends_is_torchs(seq, num_rows):
    generator = torch.Generator().manual_seed(seq + num_rows)
    row_ids = torch.randint(0, num_rows, (2, seq), generator=generator).sort(dim=1).values
    found = make_block_mask(row_ids)
    expected = create_block_mask(
        lambda b, h, query, key: (query >= key) & (row_ids[b, query] == row_ids[b, key]),
        2,
        None,
        seq,
        seq,
        device="cpu",
    )
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts = getattr(expected, f"{kind}_num_blocks")
        assert torch.equal(getattr(found, f"{kind}_num_blocks"), counts), kind
        pairs = zip(
            getattr(found, f"{kind}_indices").flatten(0, 2),
            getattr(expected, f"{kind}_indices").flatten(0, 2),
            strict=True,
        )
        for (own, torchs), count in zip(pairs, counts.flatten(), strict=True):
            assert torch.equal(own[:count], torchs[:count]), kind


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
    assert describe_layers(obstacle) == "layers: " + (
        "fused kernels" if reason is None else f"torchtune's, not the fused ones ({reason})"
    )


def test_packs_are_padded_to_whole_blocks_with_a_row_of_its_own():
    tokens, row_ids, positions = pad_packs(
        torch.tensor([[5, 6, 7]]), torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 0]])
    )
    assert tokens.tolist() == [[5, 6, 7] + [0] * 125]
    assert row_ids.tolist() == [[0, 0, 1] + [2] * 125]
    assert positions.tolist() == [[0, 1, 0] + [0] * 125]
