"""Ask base and fine-tuned model the held-out questions through llama.cpp's OpenAI API and count the right answers.

    python examples/tools/score.py runs/tools

An answer is right if it makes the row's calls with exactly their arguments, or no call if the row has none.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tune2gguf.export.folder import find_newest_gguf
from tune2gguf.export.gguf_files import read_quantization
from tune2gguf.export.pipeline import export_base
from tune2gguf.files.output import run_program
from tune2gguf.runs.run import Run, open_run
from tune2gguf.runs.validation_rows import read_validation_rows
from tune2gguf.serve.llama_cpp import LlamaCppModel, open_model
from tune2gguf.tokenizer.conversation import Prompt, cut_before_reply, make_request_messages
from tune2gguf.tokenizer.tools import sort_values

MAX_REPLY_TOKENS = 100


def ask(model: LlamaCppModel, prompt: Prompt) -> tuple[dict, ...]:
    """Return the calls that the model makes, greedily."""
    request = {
        "messages": make_request_messages(prompt.messages),
        "tools": list(prompt.tools),
        "temperature": 0,
        "max_tokens": MAX_REPLY_TOKENS,
    }
    try:
        [choice] = model.post("/v1/chat/completions", request)["choices"]
        made = [one["function"] for one in choice["message"].get("tool_calls") or []]
        calls = [{"name": one["name"], "arguments": json.loads(one["arguments"])} for one in made]
    except ValueError:  # the server cannot parse the reply, or the arguments are not JSON
        return ({"name": None, "arguments": {}},)
    return tuple(sort_values(calls))


def score(path: Path, prompts: Sequence[Prompt], *, context_length: int) -> str:
    """Return the shares of right answers as text."""
    model = open_model(path, context_length=context_length + MAX_REPLY_TOKENS)
    made = [ask(model, prompt) for prompt in prompts]
    due = [prompt.reply.tool_calls for prompt in prompts]
    pairs = [(one, other) for one, other in zip(made, due, strict=True) if other]
    names = sum([call["name"] for call in one] == [call["name"] for call in other] for one, other in pairs)
    calls = sum(one == other for one, other in pairs)
    silent = [one == () for one, other in zip(made, due, strict=True) if not other]
    return (
        f"right tool {names} of {len(pairs)}, with the right arguments {calls} of {len(pairs)}; "
        f"no call where none is due {sum(silent)} of {len(silent)}"
    )


def score_base(run: Run, path: Path, prompts: Sequence[Prompt]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        base_path = export_base(
            run.base_dir,
            Path(folder) / "base.gguf",
            quantization=read_quantization(path).name,
            chat_template=run.chat_template.name,
            takes_tools=True,
            show=False,
        )
        return score(base_path, prompts, context_length=run.max_seq_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = open_run(parser.parse_args().run)
    path = find_newest_gguf(run)
    prompts = [cut_before_reply(one) for one in read_validation_rows(run.run_dir) if one.messages]
    print(f"{path.name}, {len(prompts)} held-out questions")
    print(f"before: {score_base(run, path, prompts)}", flush=True)
    print(f"after:  {score(path, prompts, context_length=run.max_seq_len)}")


if __name__ == "__main__":
    with run_program():
        main()
