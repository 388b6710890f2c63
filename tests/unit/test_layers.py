import pytest
import torch
from torchtune.modules import FeedForward, RMSNorm

from tune2gguf.model.layers import FrozenRMSNorm, GatedMLP


def compare(ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor, **options) -> None:
    """Compare outputs and gradients, in float32 to 1e-6, in bf16 to its rounding."""
    tolerance = 1e-6 if x.dtype == torch.float32 else 2**-7
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    found, expected = (module(x, **options) for module in (ours, theirs))
    assert found.dtype == expected.dtype == x.dtype
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    gradients = [torch.autograd.grad(out, x, upstream)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=tolerance)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    return x.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_its_gradient_equal_torchtunes(dtype):
    ours, theirs = FrozenRMSNorm(48, eps=1e-2), RMSNorm(48, eps=1e-2)
    for norm in (ours, theirs):
        norm.scale.data = torch.linspace(0.5, 2, 48)
        norm.scale.requires_grad_(False)
    compare(ours, theirs, draw(3, 5, 48, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_leaves_its_input_as_it_is_and_keeps_no_copy_for_backward(dtype):
    x, kept = draw(3, 5, 48, dtype=dtype), []
    before = x.detach().clone()
    norm = FrozenRMSNorm(48)
    norm.scale.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm(x)
    assert torch.equal(x, before)
    assert [tensor.data_ptr() for tensor in kept if tensor.shape == x.shape] == [x.data_ptr()]


def make_mlps(dtype: torch.dtype) -> list[torch.nn.Module]:
    """Return our MLP and torchtune's with equal weights."""
    made = []
    for kind in (GatedMLP, FeedForward):
        torch.manual_seed(2)
        gate, down, up = (torch.nn.Linear(*dims, bias=False, dtype=dtype) for dims in ((16, 24), (24, 16), (16, 24)))
        made.append(kind(gate_proj=gate, down_proj=down, up_proj=up))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_and_its_gradient_equal_torchtunes(dtype):
    compare(*make_mlps(dtype), draw(3, 5, 16, dtype=dtype))


def test_mlp_keeps_gate_up_and_their_product():
    def list_kept(mlp: torch.nn.Module) -> list[torch.Tensor]:
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t)
        with hooks:
            mlp(draw(3, 5, 16, dtype=torch.float32))
        return [tensor for tensor in kept.values() if tensor.numel() == 3 * 5 * 24]

    ours, theirs = make_mlps(torch.float32)
    assert len(list_kept(ours)) == 3
    assert len(list_kept(theirs)) == 4  # negative control
