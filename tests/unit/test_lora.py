import copy

import pytest
import torch
from torch.nn import functional

from tests.conftest import TINY_TIED, TINY_UNTIED
from tune2gguf.model.fp8 import FrozenLinear
from tune2gguf.model.llama import build_lora_llama
from tune2gguf.model.lora import LoRALinear, apply_linears, draw_keep_mask, initialize_adapters


def make_layer(*, rank: int = 4, alpha: float = 8.0, dropout: float = 0.0) -> LoRALinear:
    torch.manual_seed(0)
    layer = LoRALinear(24, 40, rank=rank, alpha=alpha, dropout=dropout)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def make_model(**overrides):
    options = dict(lora_rank=4, lora_alpha=4.0, lora_dropout=0.0, apply_lora_to_mlp=True, max_seq_len=64)
    options["lora_attn_modules"] = ["q_proj", "k_proj", "v_proj", "output_proj"]
    model = build_lora_llama(TINY_TIED, **(options | overrides))
    for parameter in model.parameters():
        if parameter.dim() == 2:  # the layers leave their base weights to load_base
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_merged_weight_gives_the_adapter_forward():
    layer, x = make_layer(), torch.randn(5, 24)
    merged = layer.weight + layer.scaling * layer.lora_b.weight @ layer.lora_a.weight
    torch.testing.assert_close(functional.linear(x, merged), layer(x), atol=1e-5, rtol=1e-5)
    unscaled = layer.weight + layer.lora_b.weight @ layer.lora_a.weight
    assert (functional.linear(x, unscaled) - layer(x)).abs().max() > 1e-2


def test_adapter_contribution_scales_with_alpha_over_rank():
    x = torch.randn(5, 24)
    base = functional.linear(x, make_layer().weight)
    ratio_1, ratio_2, ratio_half = (make_layer(alpha=alpha)(x) - base for alpha in (4.0, 8.0, 2.0))
    torch.testing.assert_close(ratio_2, 2 * ratio_1, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ratio_half, ratio_1 / 2, atol=1e-5, rtol=1e-5)


def test_dropout_drops_the_fraction_in_training_and_nothing_in_evaluation():
    layer = make_layer(rank=1, alpha=1.0, dropout=0.2)
    layer.weight.data.zero_()
    layer.lora_a.weight.data.fill_(1.0)
    layer.lora_b.weight.data.fill_(1.0)
    # With weights of one, the output is the sum of the kept inputs, each scaled by 1 / 0.8.
    kept = layer(torch.ones(4000, 24))[:, 0] * 0.8 / 24
    assert kept.mean().item() == pytest.approx(0.8, abs=0.005)
    torch.testing.assert_close(layer.eval()(torch.ones(2, 24))[:, 0], torch.full((2,), 24.0))


def test_base_is_frozen_and_adapter_is_float32_over_a_bf16_base():
    layer = make_layer()
    layer.weight.data = layer.weight.data.bfloat16()
    out = layer(torch.randn(3, 24, dtype=torch.bfloat16))
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert layer.weight.grad is None
    assert layer.lora_a.weight.grad.dtype == layer.lora_b.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_number_of_trainable_parameters_follows_from_the_rank(rank):
    a = TINY_TIED
    query, key = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    attention = (a.embed_dim + query) + 2 * (a.embed_dim + key) + (query + a.embed_dim)
    mlp = 3 * (a.embed_dim + a.intermediate_dim)
    model = make_model(lora_rank=rank)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == a.num_layers * rank * (attention + mlp)


def test_seed_alone_decides_the_adapter():
    first, again, other = make_model(), make_model(), make_model()
    torch.manual_seed(1)
    initialize_adapters(first, 7)
    torch.manual_seed(2)
    initialize_adapters(again, 7)
    initialize_adapters(other, 8)
    names = [name for name, _ in first.named_parameters() if "lora_a" in name]
    assert all(torch.equal(first.get_parameter(name), again.get_parameter(name)) for name in names)
    assert not any(torch.equal(first.get_parameter(name), other.get_parameter(name)) for name in names)


def test_a_fresh_adapter_changes_nothing():
    model = make_model()
    initialize_adapters(model, 0)
    without = copy.deepcopy(model)
    for module in without.modules():
        if isinstance(module, LoRALinear):
            module.scaling = 0.0
    tokens = torch.randint(0, TINY_TIED.vocab_size, (2, 9))
    assert torch.equal(model.compute_hidden(tokens), without.compute_hidden(tokens))


def test_modules_without_lora_have_no_adapter():
    model = make_model(lora_attn_modules=["q_proj"], apply_lora_to_mlp=False)
    trained = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj"}


def test_unknown_module_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"o_proj.*q_proj, k_proj, v_proj, output_proj"):
        make_model(lora_attn_modules=["o_proj"])


def test_untied_model_has_a_head_of_its_own():
    options = dict(lora_rank=1, lora_alpha=1.0, lora_dropout=0.0, apply_lora_to_mlp=True, max_seq_len=8)
    tied = make_model()
    untied = build_lora_llama(TINY_UNTIED, lora_attn_modules=["q_proj"], **options)
    assert tied.head_weight is tied.decoder.tok_embeddings.weight
    assert untied.head_weight is untied.decoder.output.weight


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_equal_those_of_the_plain_computation(dropout):
    layer, upstream = make_layer(dropout=dropout), torch.randn(3, 5, 40)
    x = torch.randn(3, 5, 24, requires_grad=True)
    inputs = [x, layer.lora_a.weight, layer.lora_b.weight]
    torch.manual_seed(3)
    gradients = torch.autograd.grad(layer(x), inputs, upstream)
    torch.manual_seed(3)
    kept = 1.0 if dropout == 0 else draw_keep_mask(x.reshape(-1, 24), dropout).view(x.shape) / (dropout - 1)
    plain = x @ layer.weight.T + layer.scaling * (x * kept) @ layer.lora_a.weight.T @ layer.lora_b.weight.T
    for gradient, expected in zip(gradients, torch.autograd.grad(plain, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_together_give_what_each_alone_gives(dropout, dtype):
    """One projection has no adapter. All share dropout's mask."""
    torch.manual_seed(0)
    layers = [LoRALinear(24, size, rank=4, alpha=8.0, dropout=dropout) for size in (40, 16)]
    layers.insert(1, FrozenLinear(24, 8).requires_grad_(False))
    for layer in layers:
        for name, parameter in layer.named_parameters():
            torch.nn.init.normal_(parameter, std=0.5)
            parameter.data = parameter.data if "lora" in name else parameter.data.to(dtype)
    x = torch.randn(30, 24).to(dtype).requires_grad_()
    upstream = [torch.randn(30, size).to(dtype) for size in (40, 8, 16)]
    inputs = [x, *(parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad)]
    torch.manual_seed(3)
    outs = apply_linears(x, layers)
    found = torch.autograd.grad(outs, inputs, upstream)
    alone = []
    for layer in layers:
        torch.manual_seed(3)
        alone.append(layer(x))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for together, one in zip(outs, alone, strict=True):
        assert torch.equal(together, one)
    for gradient, expected in zip(found, torch.autograd.grad(alone, inputs, upstream), strict=True):
        assert (gradient - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dropout", [0.1, 0.2, 0.5])
def test_keep_mask_drops_the_fraction_everywhere_alike(dropout):
    keep = draw_keep_mask(torch.empty(4000, 256), dropout).float().neg()
    assert keep.unique().tolist() == [0, 1]
    assert keep.mean().item() == pytest.approx(1 - dropout, abs=0.002)
    # All four 16-bit lanes of a drawn word have the right mean, and neighbours are independent.
    assert keep.view(-1, 4).mean(0).tolist() == pytest.approx([1 - dropout] * 4, abs=0.004)
    assert (keep[:, :-1] * keep[:, 1:]).mean().item() == pytest.approx((1 - dropout) ** 2, abs=0.004)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("input_needs_gradient", [False, True])
def test_a_step_multiplies_no_more_than_lora_needs(dropout, input_needs_gradient):
    """Forward: base, A and B. Backward: gradients of A and B, and base and A again only if x needs a gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    def count_addmm(added, a, b, *args, out_shape=None, **kwargs) -> int:
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: count_addmm}  # torch does not count it
    layer, rows, in_dim, out_dim, rank = make_layer(dropout=dropout), 10, 24, 40, 4
    x = torch.randn(rows, in_dim, requires_grad=input_needs_gradient)
    with FlopCounterMode(display=False, custom_mapping=in_place) as forward:
        out = layer(x).sum()
    with FlopCounterMode(display=False, custom_mapping=in_place) as backward:
        out.backward()
    base, a, b = (2 * rows * size for size in (in_dim * out_dim, rank * in_dim, rank * out_dim))
    assert forward.get_total_flops() == base + a + b
    assert backward.get_total_flops() == 2 * b + a + (base + a if input_needs_gradient else 0)
