"""Lengths of rows and passes on a CPU."""

from __future__ import annotations

SHORTEST_STEP = 16
# Longer bf16 rows use torch's attention in bf16: at 2048 tokens it takes three quarters of the float32 time.
LONGEST_FLOAT32_ROW = 1024


def pad_length(num_tokens: int) -> int:
    """Return the padded length of a pass of `num_tokens`: at least 16, at most an eighth longer.

    oneDNN compiles and caches its products per number of tokens. Eight lengths per power of two are soon all cached.
    """
    step = max(SHORTEST_STEP, 1 << max(0, (num_tokens - 1).bit_length() - 4))
    return max(1, -(-num_tokens // step)) * step


def count_lengths(longest_pass: int) -> int:
    """Return the number of padded lengths of passes with longest_pass / 2 to longest_pass tokens."""
    return len({pad_length(tokens) for tokens in range(max(1, longest_pass // 2), longest_pass + 1)})
