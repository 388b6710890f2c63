"""The bar that an export shows on a terminal: what is done, and the time left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from tqdm import tqdm


def open_bar(label: str, *, total: int, show: bool, unit: str = "") -> tqdm:
    """Return a bar that vanishes when it is closed; where standard error is a file, nothing is drawn into it.

    Args:
        total: of what `update` is called with
        show: False draws nothing
    """
    return tqdm(total=total, desc=label, unit=unit, unit_scale=not unit, disable=None if show else True, leave=False)
