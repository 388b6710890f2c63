"""Generation on a GPU: the tokens of a recomputation, and no wait for the GPU inside a token."""

import pytest
import torch

from tests.gpu.models import CUDA, MARKS, make_model
from tune2gguf.model.caches import KVCaches
from tune2gguf.model.llama import prepare_training

pytestmark = MARKS
PROMPT, NUM_NEW = list(range(5, 25)), 30


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@torch.no_grad()
def test_greedy_tokens_equal_those_of_a_recomputation_and_no_token_waits(small_base, fuse):
    model = make_model(small_base, CUDA, base_weights="fp32").eval()
    prepare_training(model, compile=False, enable_activation_checkpointing=False, fuse=fuse)
    num_places = len(PROMPT) + NUM_NEW
    caches = KVCaches(model, batch_size=1, num_places=num_places, device=CUDA)
    mask = torch.ones(1, num_places, num_places, dtype=torch.bool, device=CUDA).tril()
    places = torch.arange(num_places, device=CUDA)[None]

    def predict(tokens: torch.Tensor, begin: int) -> torch.Tensor:
        now = slice(begin, begin + tokens.shape[1])
        return caches.predict_next(tokens, mask=mask[:, now], input_pos=places[:, now]).argmax(-1, keepdim=True)

    new = predict(torch.tensor([PROMPT], device=CUDA), 0)
    found = [new]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for begin in range(len(PROMPT), num_places - 1):
            new = predict(new, begin)
            found.append(new)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    caches.detach()

    ids = torch.tensor([PROMPT], device=CUDA)
    for _ in range(NUM_NEW):
        hidden = model.compute_hidden(ids)[:, -1]
        ids = torch.cat([ids, (hidden @ model.head_weight.T).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(torch.cat(found, dim=1), ids[:, len(PROMPT) :])
    assert len(set(ids[0, len(PROMPT) :].tolist())) > 3, "negative control: the model does not repeat one token"
