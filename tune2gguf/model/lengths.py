"""The lengths that decide how a pass is computed on a CPU."""

from __future__ import annotations

SHORTEST_STEP = 16
# Of rows up to here attention takes a whole row at once: measured at 9 and 32 heads.
LONGEST_SHORT_ROW = 128


def pad_length(num_tokens: int) -> int:
    """Return the length that a pass of so many tokens is padded to, at most an eighth longer.

    oneDNN compiles its products for every number of tokens anew, and keeps them: with eight lengths between a power of
    two and the next all are soon there. A pass of 16 tokens or fewer is padded to 16.
    """
    step = max(SHORTEST_STEP, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return max(1, -(-num_tokens // step)) * step


def count_lengths(longest_pass: int) -> int:
    """Return how many lengths passes are padded to that have from half as many tokens as the longest to as many."""
    return len({pad_length(tokens) for tokens in range(max(1, longest_pass // 2), longest_pass + 1)})
