"""Generation on a GPU: the logits of a recomputation, and no wait for the GPU inside a token."""

from pathlib import Path

import pytest
import torch

from tests.conftest import write_tiny_base
from tests.gpu.models import CUDA, MARKS, SMALL, STD, make_model, make_rows, prepare
from tests.gpu.test_sharding import shard_alone
from tune2gguf.model.architectures import Architecture
from tune2gguf.model.caches import KVCaches
from tune2gguf.model.llama import CausalLM

pytestmark = MARKS
NUM_ROWS, NUM_PROMPT, NUM_TOKENS = 3, 20, 50
# By base: root mean square error relative to the logits. The recomputation is fused, and rounds its activations to fp8
# elsewhere than the layers with caches do; a layer's own error is 6 % in fp8.
LIMITS = {"fp32": 1e-4, "bf16": 0.02, "fp8": 0.1, "nf4": 0.02}


def measure_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def append_all(caches: KVCaches, tokens: torch.Tensor, *, waits: bool) -> torch.Tensor:
    """Append the prompt at once and the rest one by one; return all logits, [rows, places, vocab].

    Raises:
        RuntimeError: if a token waits for the GPU, unless it `waits`
    """
    mask = torch.ones(NUM_ROWS, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool, device=CUDA).tril()
    places = torch.arange(NUM_TOKENS, device=CUDA).expand(NUM_ROWS, -1)

    def append(begin: int, end: int) -> torch.Tensor:
        now = slice(begin, end)
        return caches.predict_next(tokens[:, now], mask=mask[:, now], input_pos=places[:, now])

    caches.clear()
    logits = [append(0, NUM_PROMPT)]
    logits += [append(place, place + 1) for place in (NUM_PROMPT, NUM_PROMPT + 1)]  # the second one may be captured
    torch.cuda.set_sync_debug_mode("default" if waits else "error")
    try:
        logits += [append(place, place + 1) for place in range(NUM_PROMPT + 2, NUM_TOKENS)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return torch.stack(logits, dim=1)


def compare_with_recomputation(base_dir: Path, base_weights: str) -> None:
    model = prepare(make_model(base_dir, CUDA, base_weights=base_weights), fuse=base_weights != "fp32").eval()
    tokens = torch.stack(make_rows([NUM_TOKENS] * NUM_ROWS)).to(CUDA)
    caches = KVCaches(model, batch_size=NUM_ROWS, num_places=NUM_TOKENS, device=CUDA)
    # A token is looked up in host memory by the host, which waits for it.
    waits = not model.decoder.tok_embeddings.weight.is_cuda
    assert waits == (base_weights == "nf4" and base_dir.name == "untied")
    first, second = (append_all(caches, tokens, waits=waits) for _ in range(2))
    caches.detach()
    assert torch.equal(first, second), "a token's graph computes what its launches compute"

    expected = (model.compute_hidden(tokens)[:, NUM_PROMPT - 1 :] @ model.head_weight.T).float()
    assert measure_error(first, expected) < LIMITS[base_weights]
    # Negative control: the logits of a neighbouring place would be detected.
    assert measure_error(first[:, 1:], expected[:, :-1]) > 10 * LIMITS[base_weights]


@pytest.mark.parametrize("base_weights", LIMITS)
@torch.no_grad()
def test_logits_equal_those_of_a_recomputation_and_no_token_waits(small_base, base_weights):
    compare_with_recomputation(small_base, base_weights)


@torch.no_grad()
def test_an_embedding_in_host_memory_is_looked_up_outside_the_graph(tmp_path):
    untied = Architecture(**{**vars(SMALL), "tied": False})
    compare_with_recomputation(write_tiny_base(tmp_path / "untied", untied, std=STD), "nf4")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_a_sharded_base_is_gathered_in_the_graph_of_a_token_and_gives_the_bits_of_a_whole_one(tied, tmp_path):
    base_dir = write_tiny_base(tmp_path / "base", Architecture(**{**vars(SMALL), "tied": tied}), std=STD)
    tokens = torch.stack(make_rows([NUM_TOKENS] * NUM_ROWS)).to(CUDA)

    def generate(model: CausalLM) -> torch.Tensor:
        caches = KVCaches(model, batch_size=NUM_ROWS, num_places=NUM_TOKENS, device=CUDA)
        first, second = (append_all(caches, tokens, waits=False) for _ in range(2))
        assert caches.is_graphed
        caches.detach()
        assert torch.equal(first, second)
        return first

    whole, sharded = (
        prepare(make_model(base_dir, CUDA, base_weights="bf16", shard=shard), fuse=True).eval()
        for shard in (None, shard_alone)
    )
    expected = generate(whole)
    assert torch.equal(generate(sharded), expected)
    # Between tokens other passes use the buffers.
    sharded.compute_hidden(tokens)
    assert torch.equal(generate(sharded), expected)
    # Negative control: shards of another base.
    for part in sharded.sharded.parts:
        part.zero_()
    assert not torch.equal(generate(sharded), expected)
