"""General prompts, in several languages and for several tasks, beside the one that a model is trained for.

Written for this project, Apache-2.0. The scored prompts measure what a run forgets. The mixed prompts, of other topics,
become training rows beside a user's own.
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
    """Return the scored prompts. The first ones already cover all kinds."""
    return tuple(_read()["scored"])


def list_mixed_prompts() -> tuple[str, ...]:
    """Return the prompts of rows to mix in, in a shuffled but fixed order."""
    prompts = [template.format(topic) for template, topics in _read()["mixed"].items() for topic in topics]
    return tuple(random.Random(0).sample(prompts, len(prompts)))
