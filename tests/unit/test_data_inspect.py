"""inspect_data.py: its figures can be counted by hand, and it prints no control characters."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from tests.conftest import REPOSITORY, make_conversations, write_rows
from tune2gguf.data import plan_epoch
from tune2gguf.data.html import plot_lengths
from tune2gguf.data.packing import pack_rows
from tune2gguf.data.show import MARKS, Bin, escape, format_row, make_histogram
from tune2gguf.inspect_data import Inspection, inspect_config, inspect_files
from tune2gguf.tokenizer.tokenizer import load_tokenizer


def converse(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def inspect(path, tiny_base, *, max_seq_len=120, num_rows=2) -> Inspection:
    return inspect_files([str(path)], tiny_base, chat_template="chatml", max_seq_len=max_seq_len, num_rows=num_rows)


@pytest.fixture
def mixed_file(tmp_path):
    rows = [*make_conversations(40), make_conversations(1)[0], converse("Hi", ""), converse("Hi", "word " * 60)]
    rows[5]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    return write_rows(tmp_path / "mixed.jsonl", rows)


def test_rows_roles_and_reasons_are_counted(mixed_file, tiny_base):
    summary = inspect(mixed_file, tiny_base).summary
    assert summary.shapes == {str(mixed_file): "openai"}
    assert summary.roles == {"user": 42, "assistant": 42, "system": 1}
    assert summary.dropped == {"repeated": 1, "bad": 1}
    assert summary.data.ledger["truncated"] == 1
    text = inspect(mixed_file, tiny_base).format(colored=False)
    assert "rows: 43 read = 40 trained + 0 validated + 1 truncated + 2 dropped" in text
    assert "mixed.jsonl, line 42: message 2 (assistant) is empty" in text
    assert "max_seq_len=120 cuts 1 rows" in text


def test_suggested_max_seq_len_keeps_its_share_and_one_token_less_does_not(mixed_file, tiny_base):
    summary = inspect(mixed_file, tiny_base).summary
    assert summary.max_seq_lens.keys() == {1.0, 0.99, 0.95}
    for share, length in summary.max_seq_lens.items():
        assert (summary.lengths <= length).mean() >= share
        assert (summary.lengths <= length - 1).mean() < share


def test_characters_per_token_and_supervised_share_are_measured(tmp_path, tiny_base):
    path = write_rows(tmp_path / "a.jsonl", [converse("ab", "cd")])
    summary = inspect(path, tiny_base).summary
    tokenizer = load_tokenizer(tiny_base, chat_template="chatml")
    texts = ["user\nab", "\n", "assistant\n", "cd", "\n"]
    num_tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert summary.characters_per_token == pytest.approx(sum(map(len, texts)) / num_tokens)
    supervised = len(tokenizer.encode("cd")) + 1
    assert summary.supervised_share == pytest.approx(supervised / (num_tokens + 4))


def test_steps_are_those_of_an_epoch_of_rows_or_of_packs(tmp_path, tiny_base):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(40))
    summary = inspect(path, tiny_base, max_seq_len=256).summary
    rows, packed = summary.data.train, pack_rows(summary.data.train, seed=0)
    assert summary.num_steps["rows"] == len(plan_epoch(rows.lengths(), seed=0, epoch=0, rows_per_step=8)) == 5
    assert summary.num_steps["packs"] == -(-len(packed) // 8) < 5
    assert summary.fill == packed.fill


def test_histogram_counts_every_row_once():
    lengths = np.random.default_rng(0).lognormal(5, 1, 5000).astype(int)
    bins = make_histogram(lengths)
    assert sum(entry.count for entry in bins) == 5000
    for entry in bins[:-1]:
        assert entry.count == ((lengths >= entry.start) & (lengths < entry.stop)).sum()
    assert bins[-1].stop is None and bins[-1].count <= 50
    assert [entry.start for entry in make_histogram(np.array([7])) if entry.count == 1] == [7]


def test_supervised_text_is_marked_and_nothing_else(tmp_path, tiny_base):
    inspection = inspect(write_rows(tmp_path / "a.jsonl", [converse("Hi", "Höhö 👋")]), tiny_base)
    plain = format_row(inspection.rows[0], inspection.tokenizer, colored=False)
    assert plain.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Höhö 👋<|im_end|>⟧\n")
    assert MARKS == ("⟦", "⟧")
    colored = format_row(inspection.rows[0], inspection.tokenizer, colored=True)
    assert "\033[32mHöhö 👋<|im_end|>\033[0m" in colored
    assert colored.count("\033[32m") == 1


def test_control_characters_of_the_data_are_spelled_out(tmp_path, tiny_base):
    assert escape("a\033[31mb\r\n\tc\u202e") == "a\\x1b[31mb\\r\n\tc\\u202e"
    path = write_rows(tmp_path / "a.jsonl", [converse("\033[2J", "\033]0;x\a")])
    assert "\033" not in inspect(path, tiny_base).format(colored=False)


def test_page_holds_figures_and_rows_and_escapes_the_data(tmp_path, tiny_base):
    path = write_rows(tmp_path / "<b>.jsonl", [converse("<script>alert(1)</script>", "a & b")])
    page = inspect(path, tiny_base).write_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "<b>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<mark>a &amp; b&lt;|im_end|&gt;</mark>" in page


def test_histogram_of_the_page_has_a_bar_for_each_bin_and_tells_it_in_words():
    plot = plot_lengths([Bin(0, 10, 7), Bin(10, 20, 2), Bin(20, None, 1)], max_seq_len=15)
    assert plot.wide.count("fill: var(--plot-bar)") == plot.narrow.count("fill: var(--plot-bar)") == 3
    assert "0 to 9: 7, 10 to 19: 2; 20 or more: 1" in plot.label
    assert [key.text for key in plot.keys] == ["max_seq_len = 15"]
    assert plot_lengths([Bin(0, 10, 7)], max_seq_len=15).keys == ()


def test_histogram_is_a_picture_with_a_bar_for_each_bin_and_the_limit(mixed_file, tiny_base, tmp_path):
    """The pixels have a blue column for each bin with rows, and a red one at max_seq_len."""
    from matplotlib.image import imread

    inspection = inspect(mixed_file, tiny_base)
    pixels = imread(inspection.write_png(tmp_path / "lengths.png"))[..., :3]
    blue, red = ((np.abs(pixels - np.array(to_rgb(name))).max(axis=2) < 0.02) for name in ("tab:blue", "tab:red"))
    columns = (blue.sum(axis=0) > 3).astype(int)
    filled = [entry for entry in make_histogram(inspection.summary.lengths) if entry.count]
    assert np.count_nonzero(np.diff(columns) == 1) >= len(filled) - 1
    assert red.any(axis=0).any()


def test_file_that_exists_is_not_overwritten(tmp_path, tiny_base):
    inspection = inspect(write_rows(tmp_path / "a.jsonl", make_conversations(2)), tiny_base)
    for name, write in {"page.html": inspection.write_html, "lengths.png": inspection.write_png}.items():
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} exists already and is not overwritten; remove it"):
            write(tmp_path / name)
        with pytest.raises(ValueError, match=r"there is no folder .*missing"):
            write(tmp_path / "missing" / name)


def test_config_is_inspected_with_its_own_tokenizer_split_and_step(run_arguments):
    inspection = inspect_config(run_arguments[1], run_arguments[2:], num_rows=1)
    assert inspection.summary.data.ledger["trained"] == 20
    assert inspection.summary.data.ledger["validated"] == 5
    assert len(inspection.rows) == 1


def test_unreadable_data_or_tokenizer_is_one_sentence(tmp_path, tiny_base):
    with pytest.raises(ValueError, match=r"missing\.jsonl: no such file"):
        inspect(tmp_path / "missing.jsonl", tiny_base)
    path = write_rows(tmp_path / "a.jsonl", make_conversations(1))
    with pytest.raises(ValueError, match="no tokenizer"):
        inspect(path, tmp_path)
    with pytest.raises(ValueError, match=r"no base model in .*nowhere\. Get it with:\n  python scripts/download\.py"):
        inspect(path, tmp_path / "nowhere")


@pytest.mark.slow
def test_script_prints_and_writes(tmp_path, tiny_base, mixed_file):
    arguments = [str(mixed_file), "--base-dir", str(tiny_base), "--chat-template", "chatml", "--rows", "1"]
    command = [sys.executable, "scripts/inspect_data.py", *arguments, "--html", str(tmp_path / "page.html")]
    command += ["--png", str(tmp_path / "lengths.png")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens per row: median" in done.stdout
    assert done.stdout.endswith(f"wrote {tmp_path / 'page.html'}\nwrote {tmp_path / 'lengths.png'}\n")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith(f"error: {tmp_path / 'page.html'} exists already and is not overwritten; remove")


def test_ambiguous_shape_is_one_sentence_and_its_way_out_works(tmp_path, tiny_base):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(make_conversations(1)[0] | {"text": "x"}))
    with pytest.raises(ValueError, match=r"fit the formats openai and text; say which with dataset\.format=openai$"):
        inspect(path, tiny_base)
    options = {"chat_template": "chatml", "max_seq_len": 100, "num_rows": 1}
    inspection = inspect_files([str(path), "dataset.format=openai"], tiny_base, **options)
    assert inspection.summary.data.ledger["trained"] == 1


@pytest.mark.parametrize(
    ("argument", "options", "said"),
    [
        ("dataset.fromat=openai", {}, "unknown key 'dataset.fromat'; did you mean 'dataset.format'?"),
        ("dataset.format=chat", {}, "dataset.format=chat is not one of auto, openai"),
        ("dataset.validation_split=2", {}, "must be a fraction"),
        ("none.jsonl", {}, "none.jsonl: no such file"),
        ("none.jsonl", {"num_rows": -1}, "num_rows=-1 must be at least 0"),
        ("none.jsonl", {"max_seq_len": 1}, "max_seq_len=1 must be at least 2"),
    ],
)
def test_wrong_option_is_refused(tmp_path, tiny_base, argument, options, said):
    path = write_rows(tmp_path / "a.jsonl", make_conversations(2))
    options = {"chat_template": "chatml", "max_seq_len": 100, "num_rows": 1} | options
    with pytest.raises(ValueError, match=re.escape(said)):
        inspect_files([str(path), argument], tiny_base, **options)


def test_misspelled_key_of_a_config_is_refused(run_arguments):
    with pytest.raises(ValueError, match="unknown config key 'datset'; did you mean 'dataset'"):
        inspect_config(run_arguments[1], [*run_arguments[2:], "datset.format=text"], num_rows=1)


def test_rows_that_an_inspection_holds_out_are_those_of_the_run(tmp_path, tiny_base, run_arguments):
    path = write_rows(tmp_path / "mine.jsonl", make_conversations(200))
    split = "dataset.validation_split=0.2"
    files = inspect_files([str(path), split], tiny_base, chat_template="chatml", max_seq_len=512, num_rows=0)
    overrides = [*run_arguments[2:], f"dataset.files=[{path}]", "dataset.validation_files=null", split]
    run = inspect_config(run_arguments[1], overrides, num_rows=0)
    assert run.summary.data.ledger["fingerprint"] == files.summary.data.ledger["fingerprint"]
    other = inspect_files([str(path), split, "seed=7"], tiny_base, chat_template="chatml", max_seq_len=512, num_rows=0)
    assert other.summary.data.ledger["fingerprint"] != files.summary.data.ledger["fingerprint"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset.columns={prompt: question, completion: answer}"],
        ["dataset.columns.prompt=question", "dataset.columns.completion=answer"],
    ],
)
def test_mapping_of_the_columns_is_shown(tmp_path, tiny_base, overrides):
    path = write_rows(tmp_path / "a.jsonl", [{"question": f"Hi {number}?", "answer": "Ho."} for number in range(3)])
    inspection = inspect_files([str(path), *overrides], tiny_base, chat_template="chatml", max_seq_len=99, num_rows=1)
    text = inspection.format(colored=False)
    assert f"{path}: 3 rows, prompt_completion\n  prompt = column 'question', completion = column 'answer'\n" in text


def test_misspelled_part_of_a_mapping_is_refused(tmp_path, tiny_base):
    path = write_rows(tmp_path / "a.jsonl", [{"question": "Hi?", "answer": "Ho."}])
    with pytest.raises(ValueError, match=r"unknown part 'promt'; did you mean 'prompt'\?"):
        inspect_files(
            [str(path), "dataset.columns.promt=question"], tiny_base, chat_template="chatml", max_seq_len=99, num_rows=0
        )
