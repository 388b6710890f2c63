"""A sharded base on a GPU equals a whole one, with its gathers in CUDA graphs.

One GPU reads its own shards here; test_several_gpus.py reads those of other GPUs.
"""

import pytest
import torch

from tests.gpu.models import CUDA, MARKS, make_model, make_rows, pack
from tests.gpu.test_graphs import make_fused, train
from tune2gguf.data import Batch
from tune2gguf.distributed.gather import PeerCopies
from tune2gguf.distributed.world import World
from tune2gguf.model.fused import MAX_GRAPHED_TOKENS
from tune2gguf.model.llama import CausalLM, prepare_training
from tune2gguf.model.sharding import ShardedBase

pytestmark = MARKS


def shard_alone(model: CausalLM) -> None:
    world = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cuda", 0))
    model.sharded = ShardedBase(model.decoder, rank=0, size=1, connect=lambda parts: PeerCopies([parts], world))


@torch.no_grad()
def validate(model: CausalLM, batch: Batch) -> torch.Tensor:
    return model.eval()(**vars(batch.to(CUDA)))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("base_weights", ["bf16", "nf4"])
def test_gathers_in_graphs_and_between_them_give_the_bits_of_a_whole_base(small_base, base_weights, checkpointing):
    options = {"base_weights": base_weights, "dropout": 0.2}
    lengths = [[70], [40, 50], [150, 93, 17], [600] * 4, [2000] * 4 + [600]]  # the last one has no graph
    assert sum(lengths[-1]) > MAX_GRAPHED_TOKENS
    batches = [pack(make_rows(rows)) for rows in lengths]
    whole = make_fused(small_base, graphed=True, checkpointing=checkpointing, **options)
    model = make_model(small_base, CUDA, **options, shard=shard_alone)
    prepare_training(model, compile=False, enable_activation_checkpointing=checkpointing, fuse=True)
    found, expected = train(model, batches), train(whole, batches)
    assert len(model.stack.graphs.captured) >= 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(validate(model, batches[2]), validate(whole, batches[2]))
    # Negative control: shards of another base.
    for part in model.sharded.parts:
        part.zero_()
    assert not torch.equal(validate(model, batches[2]), validate(whole, batches[2]))
