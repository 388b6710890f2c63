"""The report of a run: every part in its place, all data escaped, readable with missing parts."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.runs import set_metrics, set_num_processes
from tests.unit.run_folders import (
    CONCLUSION,
    ENVIRONMENT,
    LEDGER,
    make_config,
    make_metrics,
    make_samples,
    write_run,
)
from tune2gguf.report import write_comparison, write_report
from tune2gguf.report.compare import Group, RankedRun
from tune2gguf.report.plots import plot_losses, smooth, take_series
from tune2gguf.runs.curves import Curves, TrainingStep, Validation, read_curves
from tune2gguf.runs.intervals import Estimate
from tune2gguf.runs.verdict_file import Advice, Conclusion, Outcome, Verdict, write_conclusion

HOSTILE = (
    '<script>alert(1)</script>"\' onload="alert(1)" </svg></style> {{7*7}} {% raise %} &amp; '
    "\u202eevil\u2066 \x1b[2J\x00"
)
SPELLED = HOSTILE.translate({ord(character): repr(character)[1:-1] for character in "\u202e\u2066\x1b\x00"})


class Page(HTMLParser):
    """A page's content: elements with attributes, headings and text."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.headings, self.texts, self.open = [], [], [], []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
            if any(re.fullmatch("h[1-6]", tag) for tag in self.open) and data.strip():
                self.headings.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def find(self, tag: str) -> list[dict]:
        return [attributes for found, attributes in self.elements if found == tag]


def make_page(folder, **changes) -> Page:
    return Page(write_report(write_run(folder, **changes)))


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Page:
    return make_page(
        tmp_path_factory.mktemp("runs") / "quickstart", conclusion=CONCLUSION, metrics=make_metrics(overfit=True)
    )


def test_parts_stand_in_the_order_of_their_use(judged):
    wanted = ["quickstart", "Overfitting", "Next", "Why", "Curves", "Loss", "Learning rate", "Gradient norm", "Speed",
              "Memory", "Data", "Samples", "Config", "Environment"]  # fmt: skip
    assert [heading for heading in judged.headings if heading in wanted] == wanted
    command = CONCLUSION.advice[0].command
    assert judged.text.index(command) < judged.text.index(CONCLUSION.verdict.reasons[0]) < judged.text.index("Curves")
    assert "epochs: 3 → 2" in judged.text and "learning_rate: 0.001 → 0.0005" in judged.text


def test_headings_have_levels_without_gaps(judged):
    levels = [int(tag[1]) for tag, _ in judged.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_page_needs_nothing_else(judged):
    addresses = [
        value for _, attributes in judged.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert not re.search(r"url\((?!#)", judged.source)
    assert len(judged.source.encode()) < 400_000


def test_drawings_have_labels_and_ids_that_are_unique_and_there(judged):
    drawings = [attributes for attributes in judged.find("div") if attributes.get("role") == "img"]
    assert len(drawings) == len(judged.find("svg")) == 6 and all(drawing["aria-label"] for drawing in drawings)
    ids = [attributes["id"] for _, attributes in judged.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(#|href="#|labelledby=")([^")]+)', judged.source)) <= set(ids)
    colors = set(re.findall(r"var\((--plot-[\w-]+)\)", judged.source))
    assert "--plot-validation" in colors and all(judged.source.count(f"{color}: #") == 2 for color in colors)
    assert "#0102" not in judged.source


def test_numbers_on_axes_are_not_rounded_away(judged):
    ticks = [text.strip() for text in judged.texts]
    assert "0.0002" in ticks and "0.0004" in ticks


def test_same_folder_gives_same_bytes(tmp_path):
    folder = write_run(tmp_path / "quickstart", conclusion=CONCLUSION)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert sorted(path.name for path in folder.glob("*report*")) == ["report.html"]


def test_text_of_data_config_and_model_is_text_alone(tmp_path, judged):
    name = HOSTILE.replace("/", "").replace("\0", "")
    samples = [
        replace(line, reply=HOSTILE, reference=HOSTILE, prompt=({"role": HOSTILE, "content": HOSTILE},))
        for line in make_samples()
    ]
    ledger = LEDGER | {
        "notes": [HOSTILE],
        "files": [{"file": HOSTILE, "unit": "line", "read": 1, "validation_lines": []}],
        "rows_dropped": [{"file": HOSTILE, "line": 1, "kind": HOSTILE, "reason": HOSTILE}],
    }
    advice = Advice(HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, HOSTILE)
    conclusion = Conclusion(Verdict(HOSTILE, (HOSTILE,), {HOSTILE: 1.0}), (advice,))
    metrics = [*make_metrics(until=30), TrainingStep(31, 0, skipped=HOSTILE).to_record()]
    page = make_page(
        tmp_path / name,
        samples=samples,
        ledger=ledger,
        conclusion=conclusion,
        metrics=metrics,
        config=make_config(chat_template=HOSTILE.replace("\x1b", "").replace("\0", ""), parent_run="<b>"),
        environment=ENVIRONMENT | {"platform": HOSTILE, "command": [HOSTILE, HOSTILE], "resumed": [
            {"step": 3, "started": HOSTILE, "device": HOSTILE, "git_revision": None}]},
    )  # fmt: skip
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in judged.elements} | {"tbody", "code"}
    assert len(page.find("script")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not re.search("[\x00\x1b\u202e\u2066]", page.source)
    assert page.text.count(" ".join(SPELLED.split())) >= 20
    assert "{{7*7}}" in page.source


def test_half_a_character_from_a_model_is_spelled_out(tmp_path):
    page = make_page(tmp_path / "quickstart", samples=[replace(line, reply="a\ud83d") for line in make_samples()])
    assert "a\\ud83d" in page.text


def test_joined_emoji_and_right_to_left_text_stay_whole(tmp_path):
    reply = "👩‍🚀 שלום می‌خواهم"
    page = make_page(tmp_path / "quickstart", samples=[replace(line, reply=reply) for line in make_samples()])
    assert reply in page.source
    assert {"class": "text", "dir": "auto"} in page.find("div")


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "data.json", "plan.json", "metrics.jsonl"])
def test_a_missing_file_is_said_and_the_rest_is_there(tmp_path, missing):
    folder = write_run(tmp_path / "quickstart", conclusion=CONCLUSION)
    (folder / missing).unlink()
    page = Page(write_report(folder))
    assert "Not in this report:" in page.text and missing in page.text
    assert page.headings.index("Overfitting") < page.headings.index("Environment")


@pytest.mark.parametrize("content", ["", "{", "[1]", '"text"', '{"epochs": "${nothing.there}"}', '{"label": 3}'])
def test_unreadable_files_are_said_and_no_exception(tmp_path, content):
    names = ("config.yaml", "environment.json", "data.json", "plan.json", "verdict.json", "samples.jsonl")
    folder = write_run(tmp_path / "quickstart")
    for name in names:
        (folder / name).write_text(content)
    page = Page(write_report(folder))
    assert page.headings[-1] == "Environment"
    assert page.text.count("Not in this report:") >= 2


SKIPPED = [TrainingStep(step, 0, skipped="loss is nan", tokens_per_second=1.0).to_record() for step in (1, 2, 3)]
METRICS = {
    "nothing yet": ([], "Nothing was measured yet."),
    "the base alone": (make_metrics(until=0), "Validation loss of the base"),
    "no validation rows": ([line for line in make_metrics() if "loss" in line], "No validation rows were measured"),
    "one step": (make_metrics(until=1)[1:], "step 1"),
    "all steps left out": (SKIPPED, "3 steps were left out"),
    "one validation": ([*make_metrics(until=5), make_metrics()[-1]], "Best validation loss"),
    "not a number": (
        [TrainingStep(1, 0, loss=math.nan, lr=1e-3, grad_norm=math.inf).to_record(),
         Validation(1, 0, math.nan, math.nan, math.nan, 1).to_record()],
        "nan",
    ),
    "without intervals": (
        [{key: value for key, value in line.items() if key not in ("val_low", "val_high")} for line in make_metrics()],
        "Best validation loss",
    ),
    "losses of zero": ([line | dict.fromkeys({"loss", "val_loss"} & {*line}, 0.0) for line in make_metrics()], "0.000"),
}  # fmt: skip


@pytest.mark.parametrize("case", METRICS)
def test_sparse_metrics_give_a_report(tmp_path, case):
    metrics, wanted = METRICS[case]
    page = make_page(tmp_path / "quickstart", metrics=metrics, samples=[])
    assert wanted in page.text
    assert "num_samples=3" in page.text


def test_a_line_half_written_by_a_running_run_is_no_problem(tmp_path):
    folder = write_run(tmp_path / "quickstart", is_finished=False)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 196, "epo')
    assert "Not in this report" not in Page(write_report(folder)).text


def test_a_running_or_killed_run_says_where_it_stands_and_how_to_go_on(tmp_path):
    page = make_page(tmp_path / "quickstart", metrics=make_metrics(until=100), is_finished=False)
    assert "Not finished step 100 of 195, in epoch 2 of 3" in page.text
    assert "examples/quickstart/lora.yaml output_dir=runs/quickstart resume=auto" in page.text
    assert page.find("progress")[0] | {"aria-label": ""} == {"max": "195", "value": "100", "aria-label": ""}
    assert "None yet" in page.headings


def test_a_run_with_more_epochs_than_its_last_end_is_unfinished(tmp_path):
    folder = write_run(tmp_path / "quickstart", conclusion=CONCLUSION, config=make_config(epochs=4), num_steps=260)
    page = Page(write_report(folder))
    assert "step 195 of 260" in page.text and "Given at an earlier end" in page.text


def test_a_run_that_stopped_early_is_finished(tmp_path):
    metrics = make_metrics(steps=300, until=280, overfit=True)
    config = make_config(early_stopping_patience=2)
    assert "Stopped early" in make_page(tmp_path / "early", metrics=metrics, config=config, num_steps=300).text
    assert "Not finished" in make_page(tmp_path / "cut", metrics=metrics, num_steps=300).text


def test_a_later_verdict_takes_the_place_of_the_earlier(tmp_path):
    folder = write_run(tmp_path / "quickstart", conclusion=CONCLUSION)
    verdict = Verdict("good fit", ("It fell and stayed.",), {"gain": 1.5})
    write_conclusion(folder, Conclusion(verdict, (Advice("python scripts/export.py runs/x"),)))
    path = write_report(folder, is_finished=True)
    page = Page(path)
    assert "Good fit" in page.headings and "Overfitting" not in page.headings
    assert "python scripts/export.py runs/x" in page.text


def test_whether_the_parents_advice_helped_is_said(tmp_path):
    outcome = Outcome(helped=True, difference=-0.031, low=-0.05, high=-0.012, rows=12, final_difference=-0.2)
    page = make_page(
        tmp_path / "child",
        conclusion=replace(CONCLUSION, outcome=outcome),
        config=make_config(parent_run="runs/parent"),
    )
    assert "Beside runs/parent: it helped; validation loss of the best adapter -0.0310 nats a token" in page.text
    assert "Follows the advice of runs/parent" in page.text


def test_a_run_on_several_processes_goes_on_with_as_many(tmp_path):
    folder = write_run(tmp_path / "quickstart", metrics=make_metrics(until=100), is_finished=False)
    set_num_processes(folder, 8)
    assert "tune run --nproc_per_node 8 recipes/lora_finetune.py --config" in Page(write_report(folder)).text


def test_ledger_adds_up_in_words(judged):
    assert "299 rows read = 250 trained + 12 validated + 30 truncated + 7 dropped" in judged.text
    assert "repeats examples/quickstart/train.jsonl, line 1" in judged.text


def test_replies_stand_beside_the_reference_in_order(judged):
    names = ["Reference", "Before training", "After epoch 1", "After epoch 2", "After epoch 3, the end"]
    assert [heading for heading in judged.headings if heading in names] == names * 2
    assert "cut off, did not end by itself" in judged.text and "equals the reference" in judged.text


def test_guide_parameters_come_first_and_every_key_is_there(judged):
    text = judged.text[judged.text.index("Config") :]
    assert text.index("learning_rate") < text.index("weight_decay") < text.index("gradient_accumulation_steps")
    assert text.index("weight_decay") < text.index("model._component_")


@pytest.mark.slow
def test_a_long_run_keeps_every_peak_and_the_page_small(tmp_path):
    losses = np.random.default_rng(0).uniform(0.9, 1.1, 50_000)
    losses[[10_000, 30_001, 40_000]] = 2, 3, 0.7
    lines = [{"step": step, "epoch": 0, "loss": loss} for step, loss in enumerate(losses.tolist(), start=1)]
    drawing = plot_losses(read_curves(write_run(tmp_path / "long", metrics=lines)), num_steps=50_000).wide
    path = max(re.findall(r'd="(.*?)"', drawing, re.DOTALL), key=len)
    x, y = np.array(re.findall(r"[ML] (\S+) (\S+)", path), float).T
    assert len(x) < 10_000
    first = y[(x > x[0] + 0.19 * np.ptp(x)) & (x < x[0] + 0.21 * np.ptp(x))].min()
    assert (first - y.min()) / np.ptp(y) == pytest.approx((3 - 2) / (3 - 0.7), rel=0.01)
    assert len(make_page(tmp_path / "page", metrics=make_metrics(steps=5000, epochs=1, every=500)).source) < 400_000


def test_memorized_rows_do_not_press_the_validation_curve_flat(tmp_path, judged):
    lines = [line | ({"loss": 1e-4} if line.get("loss", 0) and line["step"] > 100 else {}) for line in make_metrics()]
    page = make_page(tmp_path / "quickstart", metrics=lines)
    lowest = min(line["val_low"] for line in lines if "val_low" in line)
    assert f"Training losses below {lowest / 4:.3f} are off the scale." in page.text
    drawing = plot_losses(read_curves(tmp_path / "quickstart"), num_steps=195).wide
    assert ">0.1</text>" in drawing and ">0.02</text>" not in drawing
    assert "off the scale" not in judged.text


def test_smoothed_is_the_mean_of_the_steps_around():
    values = np.random.default_rng(0).normal(size=100)
    smoothed, window = smooth(values)
    half = window // 2
    assert window == 5
    for at in (0, 1, 50, 99):
        assert smoothed[at] == pytest.approx(values[max(0, at - half) : at + half + 1].mean())
    assert smooth(np.ones(1))[0].tolist() == [1.0]
    assert smooth(np.ones(0))[0].tolist() == []


def test_series_leave_out_what_is_no_number(tmp_path):
    losses = [{"loss": 2.0}, {"loss": math.nan}, {"skipped": "loss is nan"}, {"loss": 1.0}]
    steps = [TrainingStep(step, 0, **line) for step, line in enumerate(losses, start=1)]
    run_dir = write_run(tmp_path / "quickstart", metrics=[step.to_record() for step in steps])
    numbers, values = take_series(read_curves(run_dir).training, "loss")
    assert (numbers.tolist(), values.tolist()) == ([1, 4], [2, 1])


@pytest.mark.slow
def test_script_writes_and_refuses_in_a_sentence(tmp_path):
    folder = write_run(tmp_path / "quickstart")
    command = [sys.executable, "scripts/report.py"]
    done = subprocess.run([*command, str(folder)], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"wrote {folder / 'report.html'}\n"), done.stderr
    judged = write_run(tmp_path / "judged", conclusion=CONCLUSION)
    done = subprocess.run([*command, str(judged)], cwd=REPOSITORY, capture_output=True, text=True)
    first, *reasons, _ = done.stdout.splitlines()
    assert first == "verdict: overfitting"
    assert f"  {CONCLUSION.advice[0].command}" in reasons
    for wrong, reason in ((tmp_path / "none", "no such folder"), (tmp_path, "not the folder of a run")):
        refused = subprocess.run([*command, str(wrong)], cwd=REPOSITORY, capture_output=True, text=True)
        assert refused.returncode == 1 and reason in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "report.html").exists()


@pytest.fixture
def make_compared(tmp_path):
    def make(name: str, **metrics) -> RankedRun:
        (tmp_path / "metrics.jsonl").touch()
        set_metrics(tmp_path, make_metrics(**metrics))
        return RankedRun(
            name=name,
            run_dir=tmp_path,
            curves=read_curves(tmp_path),
            behind=None,
            differences={"learning_rate": "1e-4"},
            seconds=75.0,
            peak_memory_bytes=10**9,
            verdict="good fit",
            is_finished=True,
        )

    return make


def test_comparison_lists_only_runs_on_the_same_rows_together(tmp_path, make_compared):
    worse = replace(make_compared("worse", floor=0.6), behind=Estimate(0.41, 0.35, 0.47))
    groups = [
        Group(12, [make_compared("better", floor=0.2), worse]),
        Group(12, [make_compared("other rows", floor=0.1)]),
        Group(0, [replace(make_compared("unmeasured"), curves=Curves())]),
    ]
    page = Page(write_comparison(groups, tmp_path / "comparison.html"))
    order = [text for text in page.texts if text in ("worse", "better", "other rows", "unmeasured")]
    # In each part, the names are in the legend and then in the table.
    assert order == ["better", "worse"] * 2 + ["other rows"] * 2 + ["unmeasured"]
    assert "On the same 12 validation rows" in page.headings and "Without a validation loss" in page.headings
    assert "+0.410 (+0.350 to +0.470)" in page.text
    assert "1 min 15 s" in page.text and "1.0 GB" in page.text
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_comparison_escapes_names_and_refuses_equal_ones(tmp_path, make_compared):
    page = Page(write_comparison([Group(12, [make_compared(HOSTILE)])], tmp_path / "comparison.html"))
    assert len(page.find("script")) == 1 and " ".join(SPELLED.split()) in page.text
    with pytest.raises(ValueError, match="runs must have different names"):
        write_comparison([Group(12, [make_compared("a"), make_compared("a")])], tmp_path / "x.html")
    assert "0 runs compared" in Page(write_comparison([], tmp_path / "none.html")).text


def test_many_runs_differ_in_colour_or_dashes(tmp_path, make_compared):
    runs = [make_compared(f"run {number}", seed=number, every=65) for number in range(20)]
    page = Page(write_comparison([Group(12, runs)], tmp_path / "comparison.html"))
    looks = [(key["class"], key["style"]) for key in page.find("span") if "key" in key.get("class", "")]
    assert len(looks) == 20 and len(set(looks)) >= 16


def test_row_of_a_file_without_lines_is_called_a_row(tmp_path):
    files = [{**LEDGER["files"][0], "unit": "row"}, LEDGER["files"][1]]
    cut = [{**LEDGER["rows_truncated"][0], "file": file["file"], "line": 3} for file in files]
    dropped = [{**LEDGER["rows_dropped"][0], "file": file["file"], "line": 4} for file in files]
    ledger = {**LEDGER, "files": files, "rows_truncated": cut, "rows_dropped": dropped}
    page = Page(write_report(write_run(tmp_path / "run", ledger=ledger)))
    for line, unit in ((3, "row"), (4, "row"), (3, "line"), (4, "line")):
        file = files[unit == "line"]["file"]
        assert f"{file}, {unit} {line}" in page.text
