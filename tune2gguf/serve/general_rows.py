"""General rows, trained beside a user's own against forgetting: general prompts with the base's own replies."""

from __future__ import annotations

import json
from pathlib import Path

from tune2gguf.data.general import list_mixed_prompts
from tune2gguf.files.atomic import write_text
from tune2gguf.model.generate import generate_together, kv_caches, make_reply
from tune2gguf.runs.adapter import switch_adapter_off
from tune2gguf.runs.files import GENERAL_FILE
from tune2gguf.runs.run import Run
from tune2gguf.serve.adapter_model import load_trained_model
from tune2gguf.tokenizer.conversation import Message
from tune2gguf.tokenizer.tokenizer import load_tokenizer

MAX_TOKENS = 48
PROMPTS_AT_A_TIME = 50


def make_general_rows(run: Run) -> tuple[Path, int, int]:
    """Write the base's replies to general prompts; return the JSONL file, its number of rows and of prompts left out.

    A prompt is left out if its reply is empty or does not end within MAX_TOKENS and max_seq_len: a cut reply would
    teach cut replies.

    Raises:
        ValueError: if base or adapter are missing or do not fit together, or no reply ended
    """
    tokenizer = load_tokenizer(run.base_dir, chat_template=run.chat_template.name)
    model, device = load_trained_model(run)
    switch_adapter_off(model)
    prompts = {one: tokenizer.encode_prompt([Message("user", one)]) for one in list_mixed_prompts()}
    fitting = [one for one, ids in prompts.items() if len(ids) < run.max_seq_len]
    rows = []
    for begin in range(0, len(fitting), PROMPTS_AT_A_TIME):
        batch = fitting[begin : begin + PROMPTS_AT_A_TIME]
        ids = [prompts[one] for one in batch]
        caches = {"batch_size": len(ids), "num_places": max(map(len, ids)) + MAX_TOKENS}
        with kv_caches(model, tokenizer, max_seq_len=run.max_seq_len, device=device, **caches) as base:
            answers = generate_together(base, ids, max_tokens=MAX_TOKENS)
        for prompt, prompt_ids, answer_ids in zip(batch, ids, answers, strict=True):
            reply = make_reply(tokenizer, prompt_ids, answer_ids)
            if reply.ended_by_itself and reply.text.strip():
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply.text}]
                rows.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    if not rows:
        raise ValueError(f"{run.base_dir}: no reply to a general prompt ended within {MAX_TOKENS} tokens")
    path = run.run_dir / GENERAL_FILE
    write_text(path, "".join(rows))
    return path, len(rows), len(prompts) - len(rows)
