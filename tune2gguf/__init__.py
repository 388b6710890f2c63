"""LoRA fine-tuning of Llama models with torchtune, from training rows to a GGUF that Ollama loads."""

import os

# OpenMP's threads spin at every barrier, by default until a descheduled thread comes back: beside other programs a step
# took 60 times as long. 1000 rounds are as fast as 10 000 on an idle machine, and twice as fast beside two busy
# processes (benchmarks/busy_cpu.py). The library reads this when torch loads it, so it must be set before. A user's
# setting stays.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def __getattr__(name: str):
    # Late: tune2gguf.pth imports this package at every start of Python.
    if name in ("ask", "export_run", "run_recipe"):
        from tune2gguf import scripting

        return getattr(scripting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
