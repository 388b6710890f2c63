"""One case of test_compiled_equals_eager in its own process: `python -m tests.gpu.compiled_case BASE CASE`."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.gpu.models import CUDA, compute, make_batch, make_model, make_rows, measure_errors, pack, prepare

# base_weights, is_packed, checkpointing
CASES = list(itertools.product(("fp32", "nf4"), (False, True), (False, True)))


def start_cases(pool: ThreadPoolExecutor, base_dir: Path, folder: Path) -> dict[tuple, Future]:
    return {case: pool.submit(_run, base_dir, case, folder / f"{number}.log") for number, case in enumerate(CASES)}


def _run(base_dir: Path, case: tuple, log: Path) -> dict:
    command = [sys.executable, "-m", "tests.gpu.compiled_case", str(base_dir), json.dumps(case)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as errors:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=400
        )
    assert done.returncode == 0, log.read_text()
    return json.loads(done.stdout.splitlines()[-1])


def measure(base_dir: Path, *, base_weights: str, is_packed: bool, checkpointing: bool) -> dict:
    """Return the errors of compiled against eager, and whether every adapter has a gradient."""
    make = pack if is_packed else make_batch
    # Two lengths: the second recompiles with dynamic lengths.
    batches = [make(make_rows([length, length])) for length in (96, 160)]
    eager = compute(make_model(base_dir, CUDA, base_weights=base_weights), *batches)
    model = make_model(base_dir, CUDA, base_weights=base_weights)
    compiled = compute(prepare(model, compile=True, checkpointing=checkpointing), *batches)
    has_gradients = all(bool(gradient.any()) for gradient in compiled.gradients.values())
    return {"errors": measure_errors(compiled, eager), "every_adapter_has_a_gradient": has_gradients}


def main() -> None:
    base_dir, case = Path(sys.argv[1]), json.loads(sys.argv[2])
    options = dict(zip(("base_weights", "is_packed", "checkpointing"), case, strict=True))
    print(json.dumps(measure(base_dir, **options)))


if __name__ == "__main__":
    main()
