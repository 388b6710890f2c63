"""LoRA fine-tuning of Llama models with torchtune, from training rows to a GGUF that Ollama loads."""


def __getattr__(name: str):
    # Late: tune2gguf.pth imports this package at every start of Python.
    if name in ("ask", "export_run", "run_recipe"):
        from tune2gguf import scripting

        return getattr(scripting, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
