"""Base checkpoints in Hugging Face's layout: opened, checked, and read one tensor at a time.

Weights are bf16, float16, float32, or bitsandbytes' NF4. A 4-bit checkpoint may leave any tensor unquantized; each is
read as it is stored. A GGUF may take the place of the safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tune2gguf.base.bnb4bit import StoredNf4, group_nf4, read_nf4
from tune2gguf.base.gguf_rounding import GGUF_SCHEME, get_gguf_type, make_rounding
from tune2gguf.base.gguf_weights import StoredGguf, list_differences, list_stored, read_quantization
from tune2gguf.base.layout import ROPE_FACTORS, TensorSpec, get_gguf_name, list_tensors, to_tune_rows
from tune2gguf.base.safetensors_file import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    get_torch_dtype,
    map_file,
    read_float32_rows,
    read_header,
    read_raw,
    read_tensor,
    view_tensor,
)
from tune2gguf.files.json_files import JsonObject, read_json
from tune2gguf.model.architectures import Architecture, read_architecture
from tune2gguf.model.nf4 import BLOCK_SIZE, Nf4Weight, quantize_nf4

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WEIGHT_DTYPES = ("BF16", "F16", "F32", "NF4")
COMPARED_BYTES = 1 << 24  # per read
SLAB_ELEMENTS = 1 << 20  # elements that a core rounds at a time
MAX_LISTED = 5  # tensors named in one error


@dataclass(frozen=True)
class BaseCheckpoint:
    """An opened base folder; its weights stay on disk. `specs` and `stored` are keyed by torchtune's names.

    With `rounds_to` fp8 or nf4, rows of the layers' matrices are read rounded to it. With gguf:TYPE rows of all
    matrices are read as a GGUF of that type holds them.
    """

    base_dir: Path
    architecture: Architecture
    specs: dict[str, TensorSpec]
    stored: dict[str, StoredTensor | StoredNf4 | StoredGguf]
    rounds_to: str | None = None

    def read_tensor(self, name: str) -> Tensor:
        """Read a tensor by torchtune's name, in torchtune's row order and the stored dtype; NF4 and GGUF as float32."""
        if self.gguf_path is not None:
            return self._read_by_rows(name, None)
        tensor = self._read_stored(name)
        return tensor.dequantize() if isinstance(self.stored[name], StoredNf4) else tensor

    def _is_as_wanted(self, name: str, dtype: torch.dtype | None, *, is_copied: bool) -> bool:
        """Whether a view of the mapped file will do. Norms never: they become float32 anyway."""
        stored, spec = self.stored[name], self.specs[name]
        if self._round_rows is not None or self.gguf_path is not None:
            return False
        if isinstance(stored, StoredNf4) or spec.num_heads is not None or len(spec.shape) < 2:
            return False
        return is_copied or not spec.is_linear if dtype is None else get_torch_dtype(stored) == dtype

    def _read_stored(self, name: str) -> Tensor | Nf4Weight:
        stored, num_heads = self.stored[name], self.specs[name].num_heads
        if isinstance(stored, StoredNf4):
            weight = read_nf4(stored)
            return weight if num_heads is None else weight.reorder_rows(lambda rows: to_tune_rows(rows, num_heads))
        tensor = read_tensor(stored)
        return tensor if num_heads is None else to_tune_rows(tensor, num_heads)

    def _read_as(self, name: str, dtype: torch.dtype | None) -> Tensor | Nf4Weight:
        if self._round_rows is not None or self.gguf_path is not None:
            return self._read_by_rows(name, dtype)
        weight = self._read_stored(name)
        if not isinstance(self.stored[name], StoredNf4):
            return weight if dtype is None else weight.to(dtype)
        return weight if dtype is None and self.specs[name].is_linear else weight.dequantize(dtype)

    def _read_by_rows(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """Read a tensor as a GGUF holds it, one slab of rows per core at a time; norms are float32."""
        import torch

        shape = self.specs[name].shape
        weight = torch.empty(shape, dtype=dtype if len(shape) > 1 else torch.float32)
        step = max(1, SLAB_ELEMENTS // math.prod(shape[1:]))

        def fill(begin: int) -> None:
            end = min(begin + step, shape[0])
            weight[begin:end] = torch.from_numpy(np.ascontiguousarray(self.read_rows(name, begin, end)))

        with ThreadPoolExecutor() as threads:
            [*threads.map(fill, range(0, shape[0], step))]
        return weight

    @cached_property
    def gguf_path(self) -> Path | None:
        """The GGUF in the folder; None for safetensors."""
        stored = next(iter(self.stored.values()))
        return stored.path if isinstance(stored, StoredGguf) else None

    @cached_property
    def gguf_type(self) -> str | None:
        """The type of the GGUF in the folder, such as Q4_K_M; None for safetensors."""
        return None if self.gguf_path is None else read_quantization(self.gguf_path).name

    @property
    def holds_nf4(self) -> bool:
        """Whether the folder holds 4-bit weights."""
        return any(isinstance(stored, StoredNf4) for stored in self.stored.values())

    def round_to_fp8(self) -> BaseCheckpoint:
        """Return this base with rounds_to="fp8"."""
        return replace(self, rounds_to="fp8")

    def round_to_gguf(self, type_name: str) -> BaseCheckpoint:
        """Return this base with rounds_to="gguf:TYPE", TYPE being a GGUF type such as Q4_K_M.

        A base that is a GGUF of this type is returned as it is.

        Raises:
            ValueError: if it is a GGUF of another type
        """
        if self.gguf_type == type_name:
            return self
        if self.gguf_type is not None:
            raise ValueError(f"{self.gguf_path} holds {self.gguf_type}, not {type_name}")
        return replace(self, rounds_to=f"{GGUF_SCHEME}{type_name}")

    @cached_property
    def _round_rows(self) -> Callable[[str, np.ndarray], np.ndarray] | None:
        type_name = None if self.rounds_to is None else get_gguf_type(self.rounds_to)
        return None if type_name is None else make_rounding(self.specs, self.architecture, type_name)

    def round_to_nf4(self) -> BaseCheckpoint:
        """Return this base with rounds_to="nf4".

        Raises:
            ValueError: if a row is not a multiple of 64 weights, NF4's block size
        """
        uneven = [spec.hf_name for spec in self.specs.values() if spec.is_linear and spec.shape[1] % BLOCK_SIZE]
        if uneven:
            raise ValueError(
                f"{self.base_dir}: {uneven[0]} cannot become NF4; a row must be a multiple of {BLOCK_SIZE} weights"
            )
        return replace(self, rounds_to="nf4")

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Read rows [begin, end) in torchtune's (and GGUF's) row order, float32 [end - begin, in].

        Only FP8 and NF4 need torch.
        """
        spec, stored = self.specs[name], self.stored[name]
        if isinstance(stored, StoredGguf):
            return stored.read_rows(begin, end)
        if spec.num_heads is None:
            return self._read_hf_rows(name, begin, end)
        # Reordering moves rows within their head only.
        head_dim = spec.shape[0] // spec.num_heads
        first_head, end_head = begin // head_dim, -(-end // head_dim)
        heads = self._read_hf_rows(name, first_head * head_dim, end_head * head_dim)
        rows = to_tune_rows(heads, end_head - first_head)
        return rows[begin - first_head * head_dim : end - first_head * head_dim]

    def _read_hf_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        rows = self._read_stored_rows(name, begin, end)
        if self._round_rows is not None:
            return self._round_rows(name, rows)
        if isinstance(self.stored[name], StoredNf4) or self.rounds_to is None or not self.specs[name].is_linear:
            return rows
        import torch

        if self.rounds_to == "fp8":
            from tune2gguf.model.fp8 import quantize_weight

            # Training quantizes from bf16, too.
            return quantize_weight(torch.from_numpy(rows).bfloat16()).dequantize(torch.float32).numpy()
        # Training also rounds the scales to 8 bits.
        return quantize_nf4(torch.from_numpy(rows)).dequantize(torch.float32).numpy()

    def _read_stored_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        stored = self.stored[name]
        if not isinstance(stored, StoredNf4):
            return read_float32_rows(stored, begin, end)
        if stored.has_whole_rows:
            return read_nf4(stored, begin=begin, end=end).dequantize().numpy()
        return read_nf4(stored).dequantize()[begin:end].numpy()

    def iterate_tensors(
        self, *, dtype: torch.dtype | None = None, is_copied: bool = False
    ) -> Iterator[tuple[str, Tensor | Nf4Weight]]:
        """Yield (torchtune's parameter name, weight in torchtune's layout), one at a time, in file order.

        Embedding and head, and with `dtype` the layers' matrices, are views of the mapped file if they need no
        conversion; the processes of a machine share these pages. All other weights are fresh memory. Peak memory is
        what the caller keeps plus two copies of one tensor.

        Args:
            dtype: convert to it; None keeps the stored dtype, and 4-bit layer weights as Nf4Weight
            is_copied: the caller copies every weight to a GPU: yield views of all weights that need no conversion
        """
        maps: dict[Path, Tensor] = {}
        for name in sorted(self.stored, key=lambda name: (self.stored[name].path, self.stored[name].begin)):
            if self._is_as_wanted(name, dtype, is_copied=is_copied):
                path = self.stored[name].path
                if path not in maps:
                    maps[path] = map_file(path)
                yield name, view_tensor(maps[path], self.stored[name])
            else:
                yield name, self._read_as(name, dtype)


def open_base(base_dir: str | Path) -> BaseCheckpoint:
    """Open a base folder and check names, shapes and dtypes of its tensors against config.json; reads headers only.

    Raises:
        ValueError: if a file is missing, truncated or corrupted, the weights are pickles, or a tensor is missing,
            unexpected, or has a wrong shape or dtype
    """
    base_dir = Path(base_dir)
    architecture = read_architecture(base_dir)
    _check_quantization(base_dir)
    specs = {spec.hf_name: spec for spec in list_tensors(architecture)}
    gguf_path = find_gguf(base_dir)
    found = group_nf4(_read_headers(base_dir)) if gguf_path is None else _read_gguf(gguf_path, specs, architecture)
    _check_tensors(base_dir, specs, found, architecture.tied)
    return BaseCheckpoint(
        base_dir=base_dir,
        architecture=architecture,
        specs={spec.tune_name: spec for spec in specs.values()},
        stored={spec.tune_name: found[spec.hf_name] for spec in specs.values()},
    )


def _check_quantization(base_dir: Path) -> None:
    path = base_dir / "config.json"
    config = JsonObject(path, read_json(path)).open("quantization_config")
    if config is None:
        return
    if config.values.get("quant_method") != "bitsandbytes":
        config.refuse("quant_method", "only bitsandbytes' NF4 and unquantized bases are supported")
    if config.values.get("load_in_8bit"):
        config.refuse("load_in_8bit", "only bitsandbytes' NF4 is supported, not its 8 bits")


def _read_headers(base_dir: Path) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for path in find_weight_files(base_dir):
        for name, stored in read_header(path).items():
            if name in found:
                raise ValueError(
                    f"{base_dir}: tensor {name!r} is in both {found[name].path.name} and {path.name}; download it again"
                )
            found[name] = stored
    return found


def find_gguf(base_dir: Path) -> Path | None:
    """Return the GGUF of a base folder without safetensors; None beside them, where a GGUF may be an export of theirs.

    Raises:
        ValueError: if there are several
    """
    paths = sorted(base_dir.glob("*.gguf"))
    if not paths or (base_dir / INDEX_FILE).exists() or any(base_dir.glob("*.safetensors")):
        return None
    if len(paths) > 1:
        raise ValueError(f"{base_dir}: has {_list_few([path.name for path in paths])}; keep the one to train over")
    return paths[0]


def _read_gguf(
    path: Path, specs: dict[str, TensorSpec], architecture: Architecture
) -> dict[str, StoredTensor | StoredNf4 | StoredGguf]:
    """Return a GGUF's tensors by their Hugging Face names; those of no spec keep their GGUF name."""
    differences = list_differences(path, architecture)
    if differences:
        raise ValueError(
            f"{path} and config.json do not fit together; take the config.json of the GGUF's model:\n  "
            + "\n  ".join(differences)
        )
    tensors = list_stored(path)
    names = {get_gguf_name(spec.tune_name): spec.hf_name for spec in specs.values()}
    return {names.get(name, name): stored for name, stored in tensors.items() if name != ROPE_FACTORS}


def find_weight_files(base_dir: Path) -> list[Path]:
    """Return the safetensors files of a base folder, which an index may list, or its GGUF.

    Raises:
        ValueError: if there are none, the index is broken, or a file that it names is missing
    """
    gguf_path = find_gguf(base_dir)
    if gguf_path is not None:
        return [gguf_path]
    index_path, single_path = base_dir / INDEX_FILE, base_dir / SINGLE_FILE
    if index_path.exists() and single_path.exists():
        raise ValueError(f"{base_dir}: has both {INDEX_FILE} and {SINGLE_FILE}; remove the one that does not belong")
    if single_path.exists():
        return [single_path]
    if not index_path.exists():
        raise ValueError(_explain_missing_weights(base_dir))
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{index_path}: not a safetensors index ({error!r}); download it again") from None
    # A name with a path separator could point outside the base folder.
    foreign = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if foreign:
        raise ValueError(f"{index_path}: names {foreign[0]!r}; a file must be in the base folder")
    missing = [name for name in names if not (base_dir / name).is_file()]
    if missing:
        raise ValueError(f"{index_path}: names {len(missing)} missing files: {_list_few(missing)}; download them")
    return [base_dir / name for name in names]


def _explain_missing_weights(base_dir: Path) -> str:
    names = sorted(path.name for path in base_dir.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if shards:
        return f"{base_dir}: has {_list_few(shards)}, but neither {SINGLE_FILE} nor {INDEX_FILE}; download one"
    if pickles:
        return (
            f"{base_dir}: has its weights as pickles ({_list_few(pickles)}), which can run code; "
            "only safetensors are read: download the model's *.safetensors files"
        )
    return f"{base_dir}: has no weights; expected {SINGLE_FILE}, or shards with {INDEX_FILE}"


def _check_tensors(
    base_dir: Path, specs: dict[str, TensorSpec], found: dict[str, StoredTensor | StoredNf4 | StoredGguf], is_tied: bool
) -> None:
    head = found.pop("lm_head.weight", None) if is_tied else None
    missing = [name for name in specs if name not in found]
    # Old checkpoints store RoPE frequencies; the architecture determines them.
    unexpected = [name for name in found if name not in specs and not name.endswith("rotary_emb.inv_freq")]
    both = [(specs[name], found[name]) for name in specs if name in found]
    shapes = [
        f"{stored.name} has shape {list(stored.shape)}, expected {list(spec.shape)}"
        for spec, stored in both
        if spec.shape != stored.shape
    ]
    dtypes = [f"{stored.name} is {stored.dtype}" for _, stored in both if stored.dtype not in WEIGHT_DTYPES]
    problems = [
        f"{len(names)} {what}: {_list_few(names)}"
        for what, names in (
            ("tensors missing", missing),
            ("unexpected tensors", unexpected),
            ("shapes other than config.json's", shapes),
            (f"tensors of a dtype other than {', '.join(WEIGHT_DTYPES)}", dtypes),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{base_dir}: weights and config.json do not fit together:\n  " + "\n  ".join(problems))
    if head is not None:
        _check_tied_head(base_dir, head, found["model.embed_tokens.weight"])


def _check_tied_head(base_dir: Path, head: StoredTensor, embedding: StoredTensor) -> None:
    """Raise ValueError if a tied model stores an output head that differs from its token embedding."""
    size = head.end - head.begin
    pieces = ((begin, min(COMPARED_BYTES, size - begin)) for begin in range(0, size, COMPARED_BYTES))
    is_alike = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not (is_alike and all((read_raw(head, *piece) == read_raw(embedding, *piece)).all() for piece in pieces)):
        raise ValueError(
            f"{base_dir}: config.json has tie_word_embeddings=true, but lm_head.weight differs from the token embedding"
        )


def _list_few(names: list[str]) -> str:
    listed = ", ".join(names[:MAX_LISTED])
    return listed if len(names) <= MAX_LISTED else f"{listed} and {len(names) - MAX_LISTED} more"
