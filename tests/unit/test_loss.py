import pytest
import torch
import torch.utils._python_dispatch
from torch.nn import functional

from tune2gguf.model import loss as loss_module
from tune2gguf.model.loss import IGNORED_LABEL, cross_entropy_of_supervised, find_supervised, select_supervised


def make_problem(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3, 11, 16, generator=generator, requires_grad=True)
    weight = torch.randn(97, 16, generator=generator)
    labels = torch.randint(0, 97, (3, 11), generator=generator)
    labels[torch.rand(3, 11, generator=generator) < 0.4] = IGNORED_LABEL
    return hidden, weight, labels


def select(hidden, labels):
    return select_supervised(hidden.flatten(0, 1), labels, find_supervised(labels))


def test_what_places_select_is_what_a_mask_selects():
    hidden, _, labels = make_problem()
    labels[:, 0] = labels[2] = IGNORED_LABEL
    is_supervised = labels[:, 1:] != IGNORED_LABEL
    selected, targets = select(hidden, labels)
    assert torch.equal(selected, hidden[:, :-1][is_supervised])
    assert torch.equal(targets, labels[:, 1:][is_supervised])


def test_the_gradient_of_bf16_is_rounded_once():
    """1 / N in bf16 would scale the whole gradient up or down."""
    hidden, weight, labels = make_problem()
    hidden = hidden.detach().bfloat16().requires_grad_()
    selected, targets = select(hidden, labels)
    losses = cross_entropy_of_supervised(selected, weight.bfloat16(), targets)
    factor = torch.full_like(losses, 1 / 300)  # 0.2 % from the nearest bf16 number
    (whole,) = torch.autograd.grad(losses.sum(), selected, retain_graph=True)
    (scaled,) = torch.autograd.grad((losses * factor).sum(), selected)
    assert torch.equal(scaled, (whole.float() * factor[:, None]).bfloat16())
    assert not torch.equal(scaled, whole * factor[:, None].bfloat16()), "negative control"


def compute_plainly(hidden, weight, labels):
    logits = functional.linear(hidden, weight)[:, :-1].reshape(-1, weight.shape[0])
    return functional.cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=IGNORED_LABEL, reduction="sum")


@pytest.mark.parametrize("positions_per_chunk", [1, 5, 256])
def test_loss_and_gradient_equal_the_plain_computation(monkeypatch, positions_per_chunk):
    monkeypatch.setattr(loss_module, "POSITIONS_PER_CHUNK", {"cpu": positions_per_chunk})
    hidden, weight, labels = make_problem()
    expected = compute_plainly(hidden, weight, labels)
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    selected, targets = select(hidden, labels)
    actual = cross_entropy_of_supervised(selected, weight, targets)
    (gradient,) = torch.autograd.grad(actual.sum(), hidden)
    torch.testing.assert_close(actual.sum(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-6)


def test_unshifted_labels_are_told_apart():
    """Negative control: predicting the position's own token gives another loss."""
    hidden, weight, labels = make_problem()
    selected, targets = select(hidden, labels)
    unshifted = labels[:, :-1][labels[:, 1:] != IGNORED_LABEL].clamp(min=0)
    right = cross_entropy_of_supervised(selected, weight, targets).sum()
    wrong = cross_entropy_of_supervised(selected, weight, unshifted).sum()
    assert abs(right - wrong) > 1e-2


def test_each_position_has_its_own_weight_in_backward():
    hidden, weight, labels = make_problem()
    selected, targets = select(hidden, labels)
    upstream = torch.linspace(0, 1, targets.numel())
    (gradient,) = torch.autograd.grad(cross_entropy_of_supervised(selected, weight, targets), selected, upstream)
    plain = functional.cross_entropy(functional.linear(selected, weight), targets, reduction="none")
    (expected,) = torch.autograd.grad(plain, selected, upstream)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-6)


def test_tiny_and_huge_losses_keep_their_digits():
    weight, targets = torch.tensor([[30.0], [18.0], [-200.0]]), torch.tensor([0, 1, 2])
    losses = cross_entropy_of_supervised(torch.ones(3, 1), weight, targets)
    expected = functional.cross_entropy(weight.T.double().expand(3, 3), targets, reduction="none")
    assert expected[0] < 1e-5 and expected[2] > 200
    torch.testing.assert_close(losses.double(), expected, rtol=2e-2, atol=0)


def test_no_supervised_position_gives_no_loss_and_zero_gradient():
    hidden, weight, labels = make_problem()
    selected, targets = select(hidden, torch.full_like(labels, IGNORED_LABEL))
    losses = cross_entropy_of_supervised(selected, weight, targets)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert torch.count_nonzero(hidden.grad) == 0


def test_logits_of_all_positions_are_never_held():
    """The largest tensor is one chunk of logits, for any number of positions."""
    seen = []

    class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor))
            return out

    positions, vocab = 4 * loss_module.POSITIONS_PER_CHUNK["cpu"], 500
    hidden = torch.randn(positions, 8, requires_grad=True)
    with LargestTensor():
        cross_entropy_of_supervised(
            hidden, torch.randn(vocab, 8), torch.randint(0, vocab, (positions,))
        ).sum().backward()
    assert max(seen) == loss_module.POSITIONS_PER_CHUNK["cpu"] * vocab
