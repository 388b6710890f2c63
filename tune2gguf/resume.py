"""Go on with a run: what must be the same, and what to say where it is not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tune2gguf.runs import describe_existing


def find_path_problems(resume: str | bool, output_dir: Path) -> Iterator[str]:
    """Yield why `resume` and `output_dir` do not fit together: a run never overwrites another."""
    if resume is False:
        if os.path.lexists(output_dir):
            yield describe_existing(output_dir)
    elif resume == "auto":
        if output_dir.exists() and not (output_dir / "config.yaml").is_file():
            yield f"resume=auto: {output_dir} exists, but is not the folder of a run (config.yaml is missing)"
    elif not Path(resume).is_dir():
        yield f"resume={resume}: no such checkpoint; use auto, false, or a folder checkpoints/step_N of the run"
    elif Path(resume).resolve().parent.parent != output_dir.resolve():
        yield (
            f"resume={resume} is not a checkpoint of output_dir={output_dir}; "
            f"to go on with its run: output_dir={Path(resume).parent.parent}"
        )
