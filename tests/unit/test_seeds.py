"""A run's random numbers: different for each seed and rank, and the same after a resume."""

import io
import random

import numpy as np
import torch

from tune2gguf.train.seeds import capture_random_state, restore_random_state, seed_dropout


def draw_mask(seed: int, rank: int) -> list[float]:
    seed_dropout(seed, rank=rank)
    return torch.nn.functional.dropout(torch.ones(64), p=0.5).tolist()


def test_each_seed_and_rank_has_masks_of_its_own():
    masks = {(seed, rank): draw_mask(seed, rank) for seed in (42, 43) for rank in (0, 1, 2)}
    assert len({tuple(mask) for mask in masks.values()}) == 6
    assert all(draw_mask(seed, rank) == mask for (seed, rank), mask in masks.items())


def draw_all() -> list[float]:
    # Drawing a normal number from numpy's old generator stores a second one, which is part of its state.
    return [random.random(), np.random.normal(), np.random.random(), torch.rand(1).item(), random.gauss(0, 1)]


def test_captured_state_brings_every_generator_back_through_a_file_without_code():
    np.random.normal()
    random.gauss(0, 1)
    buffer = io.BytesIO()
    torch.save(capture_random_state(torch.device("cpu")), buffer)
    drawn = draw_all()
    assert draw_all() != drawn
    buffer.seek(0)
    restore_random_state(torch.load(buffer, weights_only=True), torch.device("cpu"))
    assert draw_all() == drawn
