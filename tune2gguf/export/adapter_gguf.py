"""The GGUF of an adapter alone, which llama.cpp applies to a base GGUF at run time.

Contents and order match llama.cpp's convert_lora_to_gguf.py (MIT) byte by byte.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, Keys, Metadata

from tune2gguf.base.layout import TensorSpec, get_gguf_name
from tune2gguf.export.merge.adapter import Adapter


def write_adapter_gguf(path: Path, adapter: Adapter, *, specs: dict[str, TensorSpec], name: str) -> None:
    """Write `blk.N.X.weight.lora_a` [rank, in] and `.lora_b` [out, rank] in float32; the runtime scales them.

    Args:
        specs: the base's tensors by torchtune's names
        name: the adapter's general.name
    """
    writer = GGUFWriter(path, "llama")
    # Sorted by Hugging Face's names: safetensors hands them to the converter in this order.
    for tune_name in sorted(adapter.pairs, key=lambda tune_name: specs[tune_name].hf_name):
        pair, gguf_name = adapter.pairs[tune_name], get_gguf_name(tune_name)
        writer.add_tensor(f"{gguf_name}.lora_a", np.ascontiguousarray(pair.lora_a))
        writer.add_tensor(f"{gguf_name}.lora_b", pair.lora_b)
    num_parameters = writer.get_total_parameter_count()[0]
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    Metadata.apply_metadata_heuristic(Metadata(), None, None, Path(name), num_parameters).set_gguf_meta_model(writer)
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(adapter.alpha))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
