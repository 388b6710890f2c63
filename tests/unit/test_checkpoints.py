import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchtune.models.convert_weights import hf_to_tune

from tests.conftest import TINY_TIED, TINY_UNTIED
from tests.tokenizer_files import find_llama3_tokenizer
from tune2gguf.base.checkpoint import open_base
from tune2gguf.base.digest import digest_base
from tune2gguf.base.layout import to_hf_rows, to_tune_rows
from tune2gguf.base.random_base import write_random_base
from tune2gguf.base.safetensors_file import StoredTensor, TensorToWrite, map_file, view_tensor, write_safetensors
from tune2gguf.files.atomic import write_folder
from tune2gguf.files.digest import digest_file


@pytest.fixture(scope="module")
def sharded_source(tmp_path_factory) -> Path:
    return write_random_base(TINY_UNTIED, tmp_path_factory.mktemp("bases") / "sharded", max_shard_bytes=30_000)


@pytest.fixture
def sharded_base(tmp_path, sharded_source) -> Path:
    """Return a copy for a test to damage."""
    return Path(shutil.copytree(sharded_source, tmp_path / "sharded"))


@pytest.fixture
def single_base(tmp_path) -> Path:
    return write_random_base(TINY_TIED, tmp_path / "single")


def get_shard(base_dir: Path, number: int) -> Path:
    return sorted(base_dir.glob("model-*.safetensors"))[number]


def load_state_dict(base_dir: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in base_dir.glob("*.safetensors") for name, tensor in load_file(path).items()}


def convert_with_torchtune(weights: dict[str, torch.Tensor], architecture) -> dict[str, torch.Tensor]:
    a = architecture
    return hf_to_tune(weights, num_heads=a.num_heads, num_kv_heads=a.num_kv_heads, dim=a.embed_dim, head_dim=a.head_dim)


def test_iterated_tensors_are_those_of_torchtunes_own_conversion(sharded_source):
    expected = convert_with_torchtune(load_state_dict(sharded_source), TINY_UNTIED)
    found = dict(open_base(sharded_source).iterate_tensors())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    in_hf_order = load_state_dict(sharded_source)["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(found["layers.0.attn.q_proj.weight"], in_hf_order)


def test_iterated_tensors_take_the_dtype_asked_for(sharded_source):
    stored, converted = (
        dict(open_base(sharded_source).iterate_tensors(dtype=dtype)) for dtype in (None, torch.float32)
    )
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    assert all(torch.equal(stored[name].float(), converted[name]) for name in stored)


@pytest.mark.parametrize("name", ["layers.0.attn.q_proj.weight", "layers.1.attn.k_proj.weight", "output.weight"])
@pytest.mark.parametrize(("begin", "end"), [(0, 16), (3, 5), (5, 13), (8, 16), (15, 16)])
def test_rows_are_the_whole_tensors_rows(sharded_source, name, begin, end):
    base = open_base(sharded_source)
    assert np.array_equal(base.read_rows(name, begin, end), base.read_tensor(name)[begin:end].float())


def test_row_orders_are_inverse_and_differ():
    rows = torch.arange(24).reshape(12, 2)
    assert torch.equal(to_hf_rows(to_tune_rows(rows, 2), 2), rows)
    assert to_tune_rows(rows, 2)[:, 0].tolist() == [0, 6, 2, 8, 4, 10, 12, 18, 14, 20, 16, 22]


def test_base_opens_without_reading_weights(single_base, monkeypatch):
    monkeypatch.setattr("tune2gguf.base.checkpoint.read_tensor", lambda *_: pytest.fail("read a tensor"))
    open_base(single_base)


def test_tied_base_has_no_output_weight(single_base):
    assert "output.weight" not in dict(open_base(single_base).iterate_tensors())


@pytest.mark.parametrize("is_same", [True, False])
def test_stored_head_of_a_tied_base_must_be_the_embedding(single_base, is_same):
    weights = load_file(single_base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    if not is_same:
        weights["lm_head.weight"][-1, -1] += 1
    save_file(weights, single_base / "model.safetensors")
    if is_same:
        assert "output.weight" not in dict(open_base(single_base).iterate_tensors())
    else:
        with pytest.raises(ValueError, match=r"lm_head\.weight differs from the token embedding"):
            open_base(single_base)


def test_missing_shard_is_named(sharded_base):
    shard = get_shard(sharded_base, 1)
    shard.unlink()
    with pytest.raises(ValueError, match=f"names 1 missing files: {shard.name}"):
        open_base(sharded_base)


@pytest.mark.parametrize(
    ("kept", "said"), [(-1, "file not fully covered"), (100, "invalid header length"), (3, "header too small")]
)
def test_truncated_shard_is_an_error(sharded_base, kept, said):
    path = get_shard(sharded_base, 0)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=said) as error:
        open_base(sharded_base)
    assert str(path) in str(error.value)


def edit_header(path: Path, edit) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    edit(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda header: header[NORM].update(data_offsets=[0, 10]), "invalid shape, data type, or offset"),
        (lambda header: header[NORM].update(data_offsets=[0, 64]), "invalid offset"),
        (lambda header: header[NORM].update(dtype="U16"), "has dtype 'U16'; supported: F64"),
        (lambda header: header[NORM].pop("shape"), "missing field `shape`"),
        (lambda header: header.update({NORM: 3}), "invalid JSON in header"),
    ],
)
def test_corrupted_header_is_an_error(single_base, edit, said):
    edit_header(single_base / "model.safetensors", edit)
    with pytest.raises(ValueError, match=said):
        open_base(single_base)


@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe", b"[1]"])
def test_header_that_is_no_json_object_is_an_error(single_base, content):
    (single_base / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    with pytest.raises(ValueError, match=r"truncated, damaged or no safetensors file \(.*; download it again"):
        open_base(single_base)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x"}}', '{"a": 1}']
)
def test_broken_index_is_an_error(sharded_base, content):
    (sharded_base / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: (not a|names [^;]*; a file must be in)"):
        open_base(sharded_base)


def test_shards_without_an_index_are_an_error(sharded_base):
    (sharded_base / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"but neither model\.safetensors nor"):
        open_base(sharded_base)


def test_single_file_beside_an_index_is_an_error(sharded_base):
    shutil.copy(get_shard(sharded_base, 0), sharded_base / "model.safetensors")
    with pytest.raises(ValueError, match="remove the one that does not belong"):
        open_base(sharded_base)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles_are_refused_unread(single_base, name):
    (single_base / "model.safetensors").rename(single_base / name)
    with pytest.raises(ValueError, match="as pickles"):
        open_base(single_base)


def test_folder_without_weights_is_an_error(single_base):
    (single_base / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        open_base(single_base)


def test_all_mismatches_come_in_one_error(single_base):
    weights = load_file(single_base / "model.safetensors")
    del weights[NORM]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    weights["model.layers.0.input_layernorm.weight"] = torch.ones(TINY_TIED.embed_dim, dtype=torch.int8)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 4)
    save_file(weights, single_base / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit together") as error:
        open_base(single_base)
    said = str(error.value)
    assert "1 tensors missing: model.norm.weight" in said
    assert "1 unexpected tensors: model.layers.0.self_attn.q_proj.bias" in said
    assert "model.layers.1.mlp.up_proj.weight has shape [3, 4], expected [64, 32]" in said
    assert "model.layers.0.input_layernorm.weight is I8" in said


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["read", "mapped"])
def test_file_that_shrinks_after_opening_is_an_error_not_a_crash(single_base, dtype):
    base = open_base(single_base)
    path = single_base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="the file changed after it was opened"):
        list(base.iterate_tensors(dtype=dtype))


def test_random_base_has_a_loss_near_ln_vocab(single_base):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(single_base, dtype=torch.float32)
    tokens = torch.randint(0, TINY_TIED.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert abs(loss - math.log(TINY_TIED.vocab_size)) < 0.2


def test_random_base_depends_on_its_seed_only(tmp_path):
    contents = [
        (write_random_base(TINY_TIED, tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_shards_hold_what_the_single_file_holds(tmp_path, sharded_source):
    single = load_file(write_random_base(TINY_UNTIED, tmp_path / "single") / "model.safetensors")
    sharded = load_state_dict(sharded_source)
    assert single.keys() == sharded.keys()
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    assert all(path.stat().st_size < 35_000 for path in sharded_source.glob("*.safetensors"))


def test_existing_folder_is_never_overwritten(single_base):
    before = (single_base / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="exists already and is not overwritten"):
        write_random_base(TINY_UNTIED, single_base)
    assert (single_base / "model.safetensors").read_bytes() == before


def test_failed_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), write_folder(tmp_path / "base") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_written_bytes_must_be_those_of_the_shape(tmp_path):
    to_write = [TensorToWrite("a", "F32", (3,))]
    with pytest.raises(ValueError, match="its chunks exceed shape"):
        write_safetensors(tmp_path / "x.safetensors", to_write, iter([torch.zeros(5)]))


def test_digest_sees_every_byte(single_base, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))
    copy = Path(shutil.copytree(single_base, tmp_path / "copy"))
    before = digest_base(single_base)
    assert digest_base(copy) == before == digest_base(single_base)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert digest_base(copy) != before
    (single_base / "tokenizer.json").write_text("{}")
    assert digest_base(single_base) != before


def test_digest_of_an_unchanged_base_reads_no_file(single_base, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))
    before = digest_base(single_base)
    monkeypatch.setattr("tune2gguf.files.digest.digest_file", lambda path: pytest.fail(f"read {path}"))
    assert digest_base(single_base) == before


@pytest.mark.slow
def test_random_base_takes_the_real_tokenizer_in_either_form(tmp_path):
    model = find_llama3_tokenizer()
    as_model = write_random_base(TINY_TIED, tmp_path / "model", tokenizer_model=model)
    as_json = write_random_base(TINY_TIED, tmp_path / "json", tokenizer_model=model, as_tokenizer_json=True)
    assert (as_model / "original" / "tokenizer.model").read_bytes() == model.read_bytes()
    # The sha256 of Llama-3.2's tokenizer.json on the hub.
    published = "6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b"
    assert digest_file(as_json / "tokenizer.json") == published
    assert not (as_json / "original").exists()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_tensors_that_are_stored_as_they_are_wanted_are_of_one_map(sharded_source, dtype):
    base = open_base(sharded_source)
    iterated = dict(base.iterate_tensors(dtype=dtype))
    assert all(torch.equal(base.read_tensor(name).to(weight.dtype), weight) for name, weight in iterated.items())
    sizes = {path.stat().st_size for path in sharded_source.glob("*.safetensors")}
    mapped = {name for name, weight in iterated.items() if weight.untyped_storage().nbytes() in sizes}
    layers = {f"layers.{n}.{part}.weight" for n in range(2) for part in ("mlp.w1", "mlp.w2", "mlp.w3", "attn.v_proj")}
    layers |= {f"layers.{n}.attn.output_proj.weight" for n in range(2)}
    ends = {"tok_embeddings.weight", "output.weight"}
    assert mapped == {None: ends, torch.bfloat16: ends | layers, torch.float32: set()}[dtype]


def test_what_is_written_to_a_mapped_tensor_does_not_reach_the_file(single_base):
    before = (single_base / "model.safetensors").read_bytes()
    for _, weight in open_base(single_base).iterate_tensors(dtype=torch.float32):
        weight.zero_()
    assert (single_base / "model.safetensors").read_bytes() == before


def test_unaligned_tensor_is_read(single_base):
    path = single_base / "odd.bin"
    path.write_bytes(b"\x00" + np.arange(4, dtype=np.float32).tobytes())
    assert view_tensor(map_file(path), StoredTensor(path, "odd", "F32", (2, 2), 1, 17)).tolist() == [[0, 1], [2, 3]]
