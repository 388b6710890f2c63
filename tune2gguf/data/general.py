"""General prompts, in several languages and of several tasks: what a model answers that was trained for one thing.

Written for this project, Apache-2.0. The scored ones tell what a run lost; the mixed ones, of other topics, become rows
that are trained beside a user's own.
"""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.resources import files


@cache
def _read() -> dict:
    return json.loads(files("tune2gguf.data").joinpath("general_prompts.json").read_text(encoding="utf-8"))


def list_scored_prompts() -> tuple[str, ...]:
    """Return the prompts that are scored; the first ones of them are of as many kinds as all."""
    return tuple(_read()["scored"])


def list_mixed_prompts() -> tuple[str, ...]:
    """Return the prompts of rows to mix in, in an order that is drawn once for ever."""
    prompts = [template.format(topic) for template, topics in _read()["mixed"].items() for topic in topics]
    return tuple(random.Random(0).sample(prompts, len(prompts)))
