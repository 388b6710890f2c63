"""The merged model as a Hugging Face folder: same shards, names and row order as the base, weights in bfloat16."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.base.bfloat16 import narrow_to_bfloat16, round_to_bfloat16
from tune2gguf.base.checkpoint import BaseCheckpoint
from tune2gguf.base.layout import to_hf_rows
from tune2gguf.base.safetensors_file import SINGLE_FILE, TensorToWrite, write_files
from tune2gguf.export.gguf_file.llama import GGUFTensor
from tune2gguf.export.gguf_file.vocabulary import read_if_there
from tune2gguf.export.merge.adapter import Adapter
from tune2gguf.export.merge.arithmetic import keep_products_on_their_thread
from tune2gguf.export.merge.slabs import iterate_slabs, read_merged_rows
from tune2gguf.files.atomic import write_folder, write_json
from tune2gguf.files.json_files import read_json
from tune2gguf.tokenizer.llama3 import make_llama3_tokenizer_json
from tune2gguf.tokenizer.templates import ChatTemplate
from tune2gguf.tokenizer.tokenizer import ChatTokenizer, find_tokenizer_file, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor


def write_merged_hf(
    out_dir: Path,
    *,
    base: BaseCheckpoint,
    adapter: Adapter,
    chat_template: ChatTemplate,
    report: Callable[[int], None],
) -> None:
    """Write the folder, replacing an earlier one atomically: a failure leaves the earlier one unchanged.

    Args:
        report: called with the number of elements done

    Raises:
        ValueError: if a merged weight is not finite
    """
    with write_folder(out_dir, overwrite=True) as unfinished, keep_products_on_their_thread():
        _write_weights(unfinished, base, adapter, report)
        _write_configs(unfinished, base.base_dir, chat_template)


def _write_weights(folder: Path, base: BaseCheckpoint, adapter: Adapter, report: Callable[[int], None]) -> None:
    """Write each tensor to the base's file name, in the base's order; from a GGUF to one file."""
    by_file: dict[str, list[str]] = {}
    for name in sorted(base.stored, key=lambda name: (base.stored[name].path.name, base.stored[name].begin)):
        file_name = SINGLE_FILE if base.gguf_path is not None else base.stored[name].path.name
        by_file.setdefault(file_name, []).append(name)
    files = {file_name: [_describe(base, name) for name in names] for file_name, names in by_file.items()}
    write_files(folder, files, _iterate_rows(base, adapter, itertools.chain(*by_file.values()), report))


def _describe(base: BaseCheckpoint, name: str) -> TensorToWrite:
    """Describe a tensor to write; norms keep their dtype, because they are not merged and GGUF has them in float32."""
    spec, stored = base.specs[name], base.stored[name]
    return TensorToWrite(spec.hf_name, "BF16" if len(spec.shape) == 2 else stored.dtype, spec.shape)


def _iterate_rows(
    base: BaseCheckpoint, adapter: Adapter, names: Iterable[str], report: Callable[[int], None]
) -> Iterator[Tensor]:
    import torch

    for name in names:
        spec = base.specs[name]
        if len(spec.shape) == 1:
            yield base.read_tensor(name)
            report(spec.shape[0])
            continue
        for slab in iterate_slabs([GGUFTensor(name, spec.shape, spec)]):
            # Merge in GGUF's row order, as for the GGUF: in another order the matrix product may round differently.
            rows = read_merged_rows(spec, slab.begin, slab.end, base=base, adapter=adapter)
            bits = narrow_to_bfloat16(round_to_bfloat16(rows))
            if spec.num_heads is not None:
                bits = to_hf_rows(bits, bits.shape[0] * spec.num_heads // spec.shape[0])
            yield torch.from_numpy(np.ascontiguousarray(bits)).view(torch.bfloat16)
            report(slab.num_elements)


def _write_configs(folder: Path, base_dir: Path, chat_template: ChatTemplate) -> None:
    config = read_json(base_dir / "config.json")
    config.pop("quantization_config", None)
    # transformers renamed torch_dtype to dtype.
    config["dtype" if "dtype" in config else "torch_dtype"] = "bfloat16"
    tokenizer = load_tokenizer(base_dir, chat_template=chat_template.name)
    generation = read_if_there(base_dir / "generation_config.json")
    ids = _choose_ids(tokenizer, generation.get("eos_token_id", config.get("eos_token_id")))
    write_json(folder / "config.json", config | ids)
    # The model has no padding, but generate() needs its id.
    said = {name: value for name, value in generation.items() if value is not None}
    write_json(folder / "generation_config.json", {"pad_token_id": tokenizer.pad_id} | said | ids)
    tokenizer_file = find_tokenizer_file(base_dir)
    if tokenizer_file.suffix == ".json":
        shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    else:
        write_json(folder / "tokenizer.json", make_llama3_tokenizer_json(tokenizer_file))
    write_json(folder / "tokenizer_config.json", _make_tokenizer_config(base_dir, chat_template))


def _choose_ids(tokenizer: ChatTokenizer, base_eos: int | list[int] | None) -> dict[str, int | list[int]]:
    """Return the bos and eos ids; eos includes the trained end of turn, which only instruct models have already."""
    own = base_eos if isinstance(base_eos, list) else [] if base_eos is None else [base_eos]
    eos = [tokenizer.end_of_turn_id, *tokenizer.end_of_text_ids, *own]
    ids: dict[str, int | list[int]] = {"eos_token_id": list(dict.fromkeys(eos))}
    if tokenizer.chat_template.beginning:
        ids["bos_token_id"] = tokenizer.special_ids[tokenizer.chat_template.beginning]
    return ids


def _make_tokenizer_config(base_dir: Path, chat_template: ChatTemplate) -> dict:
    """Return the base's tokenizer_config.json with the trained chat template and end of turn."""
    path = base_dir / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {"tokenizer_class": "PreTrainedTokenizerFast"}
    if chat_template.beginning:
        config["bos_token"] = chat_template.beginning
    return config | {"eos_token": chat_template.end_of_turn, "chat_template": chat_template.jinja_template}
