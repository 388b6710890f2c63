"""The export of a run: its files, its errors, and no file under a final name after a failure."""

import fcntl
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.parity.gguf_models import SMALL_MODELS, write_run, write_small_run
from tests.parity.make_gguf_digests import PLAIN_TYPES
from tests.runs import edit_config, set_base
from tune2gguf.base.checkpoint import open_base
from tune2gguf.export.gguf_files import count_file_bytes
from tune2gguf.export.pipeline import export_base, export_run
from tune2gguf.export.results import claim_folder
from tune2gguf.ggml.types import QUANTIZATIONS
from tune2gguf.runs.config_file import read_config


@pytest.fixture
def run_dir(tiny_base, tmp_path) -> Path:
    return write_run(tiny_base, tmp_path / "ferry", chat_template="chatml")


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_adapter(run_dir: Path, change) -> None:
    from safetensors.numpy import load_file, save_file

    path = run_dir / "last" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def list_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.slow
def test_script_writes_what_the_run_asks_for_and_prints_it(run_dir):
    command = [sys.executable, str(REPOSITORY / "scripts/export.py"), str(run_dir)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert list_files(run_dir / "export") == ["Modelfile", "README.md", "ferry-Q4_K_M.gguf"]
    names = ["ferry-Q4_K_M.gguf", "Modelfile", "README.md"]
    assert finished.stdout.splitlines()[:3] == [str(run_dir / "export" / name) for name in names]


def test_script_says_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, str(REPOSITORY / "scripts/export.py"), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stderr == (f"error: {tmp_path}: not the folder of a run (config.yaml is missing); give runs/NAME\n")


def test_several_types_in_one_reading_have_the_bytes_of_single_exports(run_dir, tmp_path):
    names = ["Q8_0", "Q4_K_M", "BF16"]
    together = export_run(run_dir, quantizations=names, num_threads=3, show=False).models
    assert [file.modelfile_path.name for file in together] == [f"Modelfile-{name}" for name in names]
    bytes_together = [file.gguf_path.read_bytes() for file in together]
    alone = [export_run(run_dir, quantizations=[name], num_threads=1, overwrite=True, show=False) for name in names]
    assert [export.models[0].gguf_path.read_bytes() for export in alone] == bytes_together


def test_slabs_do_not_change_the_bytes(run_dir, monkeypatch):
    """The small adapter's sums are exact, so slabs of any size give the same bytes."""
    whole = export_run(run_dir, quantizations=["Q8_0"], show=False).models[0].gguf_path.read_bytes()
    monkeypatch.setattr("tune2gguf.export.merge.slabs.SLAB_ELEMENTS", 256)
    cut = export_run(run_dir, quantizations=["Q8_0"], overwrite=True, show=False).models[0].gguf_path.read_bytes()
    assert cut == whole


def test_best_is_exported_where_there_is_one_and_last_on_demand(run_dir, tiny_base):
    last = export_run(run_dir, show=False).models[0].gguf_path.read_bytes()
    os.rename(run_dir / "last", run_dir / "best")
    write_run(tiny_base, run_dir, chat_template="chatml")
    edit_adapter(run_dir, lambda weights: {name: weight / 2 for name, weight in weights.items()})
    assert export_run(run_dir, overwrite=True, show=False).models[0].gguf_path.read_bytes() == last
    assert export_run(run_dir, adapter="last", overwrite=True, show=False).models[0].gguf_path.read_bytes() != last


def test_an_earlier_export_is_replaced_on_demand_only(run_dir):
    gguf_path = export_run(run_dir, show=False).models[0].gguf_path
    before = gguf_path.stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"ferry-Q4_K_M\.gguf, .*Modelfile: exists already; --force replaces it"):
        export_run(run_dir, show=False)
    assert gguf_path.stat().st_mtime_ns == before
    export_run(run_dir, overwrite=True, show=False)
    assert gguf_path.stat().st_mtime_ns != before


def test_unknown_types_are_named_with_the_list(run_dir):
    with pytest.raises(ValueError, match=r"unknown quantization Q9_9, X; choose from F32, F16, .*Q2_K"):
        export_run(run_dir, quantizations=["Q9_9", "q8_0", "X"], show=False)


def test_numbers_that_make_no_sense_are_refused(run_dir):
    with pytest.raises(ValueError, match="--threads must be at least 1, got 0"):
        export_run(run_dir, num_threads=0, show=False)
    with pytest.raises(ValueError, match="--threads must be at most 512, got 100000"):
        export_run(run_dir, num_threads=100_000, show=False)
    with pytest.raises(ValueError, match="--proof-rows must be at least 0, got -1"):
        export_run(run_dir, num_validation_rows=-1, show=False)


def test_an_export_folder_that_cannot_be_written_is_one_sentence(run_dir):
    (run_dir / "export").touch()
    with pytest.raises(
        ValueError, match=r"^writing to .*export failed: File exists; no unfinished file was left there$"
    ):
        export_run(run_dir, show=False)


def test_foreign_files_that_are_named_like_modelfiles_are_left_alone(run_dir):
    (run_dir / "export" / "Modelfile.d").mkdir(parents=True)
    (run_dir / "export" / "Modelfile").write_bytes(b"\xff\xfeFROM ./x\n")
    export = export_run(run_dir, show=False)
    assert [model.modelfile_path.name for model in export.models] == ["Modelfile-Q4_K_M"]


def test_a_run_without_adapter_is_refused(run_dir):
    with pytest.raises(ValueError, match=r"has no adapter \(best/\); check that the run has finished"):
        export_run(run_dir, adapter="best", show=False)
    (run_dir / "last" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no adapter here \(adapter_model\.safetensors is missing\)"):
        export_run(run_dir, show=False)
    assert list_files(run_dir / "export") == []


def test_a_base_that_moved_is_found_where_the_user_says(run_dir, tiny_base, tmp_path):
    edit_config(run_dir, f"base_dir={tmp_path / 'gone'}")
    with pytest.raises(ValueError, match=r"no base model in .*gone; if it was moved, give its folder with --base-dir"):
        export_run(run_dir, show=False)
    assert export_run(run_dir, base_dir=tiny_base, show=False).models[0].gguf_path.is_file()


def test_a_base_that_changed_since_training_is_refused(run_dir, tiny_untied_base):
    with pytest.raises(ValueError, match=r"is not the base that .* was trained on, or it has changed since"):
        export_run(run_dir, base_dir=tiny_untied_base, show=False)
    assert export_run(run_dir, show=False).models[0].gguf_path.is_file()


def test_an_adapter_for_another_base_is_refused_with_the_shapes(tmp_path):
    run_dir = write_small_run(SMALL_MODELS[0], tmp_path / "one")
    write_small_run(SMALL_MODELS[1], tmp_path / "other")
    set_base(run_dir, tmp_path / "other" / "base")
    with pytest.raises(ValueError, match="does not fit the base") as raised:
        export_run(run_dir, base_dir=tmp_path / "other" / "base", show=False)
    assert "layers.0.self_attn.k_proj: lora_B is [64, 8], the base and rank 8 need [128, 8]" in str(raised.value)
    assert "layers.5.self_attn.q_proj: the base has no such module" not in str(raised.value), "five problems are listed"
    assert "more" in str(raised.value).splitlines()[-1]


def test_a_module_that_cannot_be_merged_is_named(run_dir):
    key = "base_model.model.model.embed_tokens.lora_{}.weight"
    extra = {key.format("A"): np.zeros((8, 384), np.float32), key.format("B"): np.zeros((32, 8), np.float32)}
    edit_adapter(run_dir, lambda weights: weights | extra)
    with pytest.raises(ValueError, match=r"model\.embed_tokens: adapters on this module are not supported"):
        export_run(run_dir, show=False)


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"use_rslora": True}, {"bias": "all"}, {"rank_pattern": {"x": 1}}]
)
def test_kinds_of_adapters_that_would_merge_wrongly_are_refused(run_dir, change):
    edit_json(run_dir / "last" / "adapter_config.json", **change)
    with pytest.raises(ValueError, match=f"uses {next(iter(change))}; only plain LoRA can be exported"):
        export_run(run_dir, show=False)


def test_an_adapter_that_diverged_is_refused(run_dir):
    def spoil(weights):
        next(iter(weights.values()))[0, 0] = np.nan
        return weights

    edit_adapter(run_dir, spoil)
    with pytest.raises(ValueError, match="holds NaN or infinity; its training diverged"):
        export_run(run_dir, show=False)


def test_a_failure_in_the_middle_leaves_nothing(run_dir, tiny_base, tmp_path):
    base_dir = spoil_last_norm(tiny_base, tmp_path / "base")
    set_base(run_dir, base_dir)
    with pytest.raises(ValueError, match=r"model\.layers\.1\..*: holds NaN or infinity"):
        export_run(run_dir, base_dir=base_dir, quantizations=["Q8_0", "F16"], show=False)
    assert list_files(run_dir / "export") == []


def spoil_last_norm(base_dir: Path, target: Path) -> Path:
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(base_dir, target)
    weights = load_file(target / "model.safetensors")
    weights["model.layers.1.post_attention_layernorm.weight"][3] = np.inf
    save_file(weights, target / "model.safetensors")
    return target


def test_a_failure_keeps_the_earlier_export(run_dir, tiny_base, tmp_path):
    gguf_path = export_run(run_dir, show=False).models[0].gguf_path
    before = gguf_path.read_bytes()
    base_dir = spoil_last_norm(tiny_base, tmp_path / "base")
    set_base(run_dir, base_dir)
    with pytest.raises(ValueError, match="holds NaN"):
        export_run(run_dir, base_dir=base_dir, overwrite=True, show=False)
    assert gguf_path.read_bytes() == before
    assert list_files(run_dir / "export") == ["Modelfile", "README.md", "ferry-Q4_K_M.gguf"]


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))


def test_a_full_disk_is_one_line_and_leaves_nothing(run_dir):
    """Limit the size of files: writing fails as on a full disk."""
    command = [sys.executable, str(REPOSITORY / "scripts/export.py"), str(run_dir), "--quantization", "F32"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit_file_size)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].endswith("export failed: File too large; no unfinished file was left there")
    assert list_files(run_dir / "export") == []


def test_too_small_a_disk_is_found_before_the_first_byte(run_dir, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"the files need .* GB, but .*export has 0\.0 GB free"):
        export_run(run_dir, show=False)
    assert list_files(run_dir / "export") == []


def test_a_killed_export_leaves_no_final_file_and_does_not_disturb_the_next(tmp_path):
    run_dir = write_small_run(SMALL_MODELS[0], tmp_path)
    command = [sys.executable, str(REPOSITORY / "scripts/export.py"), str(run_dir), "--quantization", *PLAIN_TYPES]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    export_dir = run_dir / "export"
    while not list_files(export_dir):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert all(name.endswith(".unfinished") for name in list_files(export_dir))
    export_run(run_dir, quantizations=["Q4_K_M"], show=False)
    names = ["Modelfile", "README.md", f"{run_dir.name}-Q4_K_M.gguf"]
    assert list_files(export_dir) == names, "what the killed one left is gone"


def test_ctrl_c_leaves_nothing_and_no_traceback(tmp_path):
    run_dir = write_small_run(SMALL_MODELS[0], tmp_path)
    command = [sys.executable, str(REPOSITORY / "scripts/export.py"), str(run_dir), "--quantization", *PLAIN_TYPES]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list_files(run_dir / "export"):
        assert process.poll() is None, "it ended before it could be interrupted"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode == 130
    assert list_files(run_dir / "export") == []


def test_two_exports_do_not_write_to_one_folder_at_once(run_dir):
    with claim_folder(run_dir / "export"):
        with pytest.raises(ValueError, match=r"another export is writing to .*export; wait until it has ended"):
            export_run(run_dir, show=False)
        assert list_files(run_dir / "export") == []
    assert export_run(run_dir, show=False).models[0].gguf_path.is_file()


def test_a_merged_folder_whose_replacement_was_killed_is_put_back(run_dir):
    merged_dir = export_run(run_dir, with_merged_hf=True, show=False).merged_dir
    replaced = merged_dir.rename(merged_dir.with_name(f".{merged_dir.name}.replaced"))
    merged_dir.with_name(f".{merged_dir.name}.x1.unfinished").mkdir()
    export_run(run_dir, overwrite=True, show=False)
    assert (merged_dir / "model.safetensors").is_file() and not replaced.exists()
    assert not [name for name in list_files(run_dir / "export") if name.startswith(".")]


def test_the_disk_has_to_hold_all_that_is_asked_for(run_dir, monkeypatch):
    base = open_base(read_config(run_dir)["base_dir"])
    sizes = [count_file_bytes(base, QUANTIZATIONS[name]) for name in ("Q8_0", "Q4_K_M", "BF16")]
    usage = type("Usage", (), {"free": sum(sizes) - 1})()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    with pytest.raises(ValueError, match="the files need"):
        export_run(run_dir, quantizations=["Q8_0", "Q4_K_M"], with_merged_hf=True, show=False)
    assert list_files(run_dir / "export") == []
    export_run(run_dir, quantizations=["Q8_0", "Q4_K_M"], show=False)


@pytest.mark.slow
def test_a_full_disk_leaves_no_part_of_a_merged_folder(run_dir):
    command = [sys.executable, str(REPOSITORY / "scripts/export.py"), str(run_dir), "--merged-hf"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit_file_size)
    assert finished.returncode == 1
    [line] = finished.stderr.splitlines()
    assert line.endswith("export failed: File too large; no unfinished file was left there")
    assert list_files(run_dir / "export") == []


@pytest.mark.slow
def test_a_terminal_shows_what_is_done_and_the_time_left(run_dir):
    shown, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    command = [sys.executable, str(REPOSITORY / "scripts/export.py"), str(run_dir)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=terminal, check=True)
    text = os.read(shown, 100_000)  # before the last writer closes, which drops unread output
    assert re.search(rb"exporting Q4_K_M: +\d+%.*\[\d\d:\d\d<", text)
    os.close(shown)
    os.close(terminal)


@pytest.mark.slow
def test_a_log_file_holds_no_progress_bar(run_dir):
    command = [sys.executable, str(REPOSITORY / "scripts/export.py"), str(run_dir)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""


def test_nf4_base_is_merged_from_its_dequantized_weights(tmp_path):
    """A 4-bit base gives the same bytes as the 16-bit base with its dequantized values."""
    from safetensors.torch import save_file

    from tests.conftest import write_tiny_tokenizer
    from tune2gguf.base.checkpoint import open_base
    from tune2gguf.base.layout import to_hf_rows
    from tune2gguf.base.random_base import write_random_base
    from tune2gguf.model.architectures import make_hf_config, read_architecture

    architecture = SMALL_MODELS[2].architecture
    architecture = type(architecture)(**{**vars(architecture), "vocab_size": 384, "num_layers": 2})
    quantized_dir = write_random_base(architecture, tmp_path / "nf4" / "base", kind="bnb-4bit")
    write_tiny_tokenizer(quantized_dir)
    base = open_base(quantized_dir)
    weights = {}
    for name, spec in base.specs.items():
        tensor = base.read_tensor(name).float()
        weights[spec.hf_name] = tensor if spec.num_heads is None else to_hf_rows(tensor, spec.num_heads).contiguous()
    plain_dir = tmp_path / "plain" / "base"
    plain_dir.mkdir(parents=True)
    save_file(weights, plain_dir / "model.safetensors")
    (plain_dir / "config.json").write_text(json.dumps(make_hf_config(read_architecture(quantized_dir))))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (plain_dir / name).write_text((quantized_dir / name).read_text())
    files = []
    for base_dir in (quantized_dir, plain_dir):
        run_dir = write_run(base_dir, base_dir.parent / "run", chat_template="chatml")
        files.append(export_run(run_dir, quantizations=["Q8_0"], show=False).models[0].gguf_path.read_bytes())
    assert files[0] == files[1]


def test_base_export_refuses_to_overwrite_and_unknown_chat_templates(tiny_base, tmp_path):
    target = tmp_path / "deep" / "base.gguf"
    assert export_base(tiny_base, target, quantization="q8_0", chat_template="chatml", show=False) == target
    with pytest.raises(ValueError, match="exists already"):
        export_base(tiny_base, target, quantization="Q8_0", chat_template="chatml", show=False)
    with pytest.raises(ValueError, match="unknown chat_template 'vicuna'; choose from llama3, "):
        export_base(tiny_base, tmp_path / "x.gguf", quantization="Q8_0", chat_template="vicuna", show=False)
