"""Suggestions for an unknown key: a misspelling, the guide's name, or a key of torchtune's recipes."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from tune2gguf.guide import GUIDE_PARAMETERS

_TORCHTUNE_NAMES = {
    "max_seq_length": "max_seq_len",
    "num_warmup_steps": "warmup_steps",
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "checkpointer": "base_dir",
    "checkpoint_dir": "base_dir",
    "tokenizer.path": "base_dir",
    "tokenizer.merges_file": "base_dir",
    "quantizer": "quantization",
    "quantize_base": "base_weights",
    "dataset.source": "dataset.files",
    "dataset.data_files": "dataset.files",
    "dataset.conversation_style": "dataset.format",
    "dataset_val": "dataset.validation_files",
    "dataset.column_map": "dataset.columns",
    "dataset.prompt_template": "dataset.prompt",
    "dataset.datasets": "dataset.sources",
}

_TORCHTUNE_REASONS = {
    "loss": "the loss is always the cross entropy of the supervised tokens",
    "log_every_n_steps": "every step is logged",
    "log_level": "there is one level",
    "log_peak_memory_stats": "the peak is in every line of metrics.jsonl",
    "shuffle": "the order of the rows follows from seed",
    "save_adapter_weights_only": "only the adapter is saved; the export merges it",
    "optimizer_in_bwd": "the adapter's optimizer is small",
    "tokenizer.max_seq_len": "set max_seq_len",
    "dataset.train_on_input": "only the assistant's replies are supervised",
    "dataset.split": "a hub data set is written hub:OWNER/NAME:SPLIT in dataset.files",
    "model.apply_lora_to_output": "the output head gets no adapter",
    "model.use_dora": "a GGUF adapter cannot hold DoRA's magnitudes",
}


def suggest(name: str, known: Collection[str], *, flat: Collection[str] = ()) -> str:
    """Return the end of an 'unknown key' message.

    Args:
        name: the unknown key, dotted for a component's key
        known: the valid keys at its level
        flat: the top-level keys, suggested for a component's key as well
    """
    prefix, _, last = name.rpartition(".")
    names = {parameter.guide: parameter.key for parameter in GUIDE_PARAMETERS} | _TORCHTUNE_NAMES
    for spelling in (name, last):
        if spelling in names:
            return f"; did you mean {names[spelling]!r}?"
        if spelling in _TORCHTUNE_REASONS:
            return f"; {_TORCHTUNE_REASONS[spelling]}"
    for candidates in (known, flat):
        nearest = difflib.get_close_matches(last, candidates, n=1)
        if nearest:
            return f"; did you mean {f'{prefix}.{nearest[0]}' if prefix and candidates is known else nearest[0]!r}?"
    return f"; known keys: {', '.join(known)}"
