"""The random numbers of a run that are drawn while it trains."""

from __future__ import annotations

import numpy as np
import torch


def seed_dropout(seed: int, *, rank: int) -> None:
    """Seed torch's generators, which draw the dropout masks: the same for a seed and rank, another for each rank.

    Mixed, not added, so that rank 1 of seed 42 does not draw the masks of rank 0 of seed 43.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0]) >> 1)
