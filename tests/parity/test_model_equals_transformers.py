import pytest
import torch

from tests.conftest import write_tiny_base
from tune2gguf.base import checkpoint as base_module
from tune2gguf.base.load import load_base
from tune2gguf.model.llama import lora_llama
from tune2gguf.model.lora import initialize_adapters


def load_ours(base_dir):
    model = lora_llama(
        str(base_dir),
        architecture=None,
        lora_rank=2,
        lora_alpha=2.0,
        lora_dropout=0.0,
        lora_attn_modules=["q_proj"],
        apply_lora_to_mlp=False,
        max_seq_len=128,
    )
    load_base(model, str(base_dir), device=torch.device("cpu"), base_weights="fp32", show=False)
    initialize_adapters(model, 0)
    return model.eval()


@torch.no_grad()
def compute_both(base_dir, seq_len: int = 100):
    """Return our logits and transformers', beyond the length at which RoPE scaling starts to matter."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    ours = load_ours(base_dir)
    tokens = torch.randint(0, 384, (2, seq_len), generator=torch.Generator().manual_seed(0))
    return ours.compute_hidden(tokens) @ ours.head_weight.T, theirs(tokens).logits


@pytest.mark.parametrize("base", ["tiny_base", "tiny_untied_base"])
def test_logits_equal_transformers(base, request):
    ours, theirs = compute_both(request.getfixturevalue(base))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_without_the_row_permutation_the_logits_differ(tiny_base, monkeypatch):
    monkeypatch.setattr(base_module, "to_tune_rows", lambda tensor, num_heads: tensor)
    ours, theirs = compute_both(tiny_base)
    assert (ours - theirs).abs().max() > 1e-2


def test_another_rope_scaling_is_told_apart(tmp_path):
    from tests.conftest import TINY_TIED
    from tune2gguf.model.architectures import Architecture

    base_dir = write_tiny_base(tmp_path / "scaled", TINY_TIED)
    ours, _ = compute_both(base_dir)
    unscaled_dir = write_tiny_base(tmp_path / "unscaled", Architecture(**{**vars(TINY_TIED), "rope_scaling": None}))
    _, theirs = compute_both(unscaled_dir)
    assert (ours - theirs).abs().max() > 1e-2
