"""Random state of a training run: its seed for dropout, and capture and restore."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def seed_dropout(seed: int, *, rank: int) -> None:
    """Seed torch's generators, which draw the dropout masks, by seed and rank.

    The two are hashed, not added: rank 1 of seed 42 must not draw the masks of rank 0 of seed 43.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, rank]).generate_state(1, np.uint64)[0]) >> 1)


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator of this process, of types that torch.load reads with weights_only=True."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        **({"mps": torch.mps.get_rng_state()} if device.type == "mps" else {}),
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore every generator to a captured state."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])
