"""Forgetting: measured with the exported adapter, equal to the proof's measurement, and within its budget."""

import json
import shlex
import shutil

import pytest

from tests.conftest import REPOSITORY, TINY_UNTIED, make_conversations, make_unseen_conversations, write_tiny_base
from tests.runs import copy_real_run, get_tiny_base
from tests.unit.test_advice import advise_label, list_changes, make_situation
from tune2gguf.config import check_values, load_config
from tune2gguf.data.general import list_mixed_prompts, list_scored_prompts
from tune2gguf.export.pipeline import export_run
from tune2gguf.report import write_report
from tune2gguf.runs.forgetting import Forgetting, GeneralAnswer, read_forgetting, write_forgetting
from tune2gguf.runs.run import Run, open_run
from tune2gguf.serve.general_rows import make_general_rows
from tune2gguf.serve.proof import ADAPTER, BASE, prove_export
from tune2gguf.tokenizer.tokenizer import load_tokenizer
from tune2gguf.train.forgetting import ANSWER_TOKENS, MAX_SHARE, MIN_PROMPTS, plan_forgetting
from tune2gguf.train.validation_plan import GENERATION_COSTS
from tune2gguf.verdict.advice import GENERAL_SHARE, NOTABLE_DIVERGENCE
from tune2gguf.verdict.judge import GOOD_FIT, OVERFITTING, UNDERFITTING

UNSTEADY = (
    "dtype=fp32",
    "base_weights=fp32",
    "epochs=4",
    "learning_rate=0.02",
    "batch_size=2",
    "max_val_rows=6",
    "max_seq_len=256",
    "scheduler=constant",
    "lora_rank=4",
    "eval_every_n_steps=1",
    "score_general_prompts=true",
)


@pytest.fixture
def run_dir(tmp_path):
    # With these validation rows the best adapter is the first one.
    rows = {"training": make_conversations(8, start=200), "validation": make_unseen_conversations()}
    return copy_real_run(write_tiny_base(tmp_path / "base", TINY_UNTIED), tmp_path / "run", *UNSTEADY, **rows)


def test_a_run_measures_the_adapter_that_is_exported_as_the_proof_does(run_dir):
    """The proof has its own forward pass, with numpy weights in float32. Negative control: the last adapter."""
    run = Run(run_dir)
    assert run.curves.best.step < run.curves.final.step
    lost = run.forgetting
    assert lost.adapter == "best" and len(lost.answers) == len(list_scored_prompts())
    assert {one.prompt for one in lost.answers} == set(list_scored_prompts())
    assert all(0 < len(one.answer_ids) <= ANSWER_TOKENS for one in lost.answers)
    assert sum(one.adapter_answer is not None for one in lost.answers) == 3
    for adapter, is_same in (("best", True), ("last", False)):
        export = export_run(run_dir, quantizations=["F16"], adapter=adapter, overwrite=True, show=False)
        general = prove_export(export, num_replies=0, show=False).general
        found = general[ADAPTER]
        assert (found["increase"] == pytest.approx(lost.loss_increase.value, rel=1e-3)) is is_same
        assert (found["kl_to_base"] == pytest.approx(lost.divergence.value, rel=1e-3)) is is_same
        assert found["top1"] == pytest.approx(lost.agreement, abs=0.01) or not is_same
    assert general[BASE]["increase"] == general[BASE]["kl_to_base"] == 0 and general[BASE]["top1"] == 1
    base_loss = sum(one.base_loss for one in lost.answers) / sum(len(one.answer_ids) for one in lost.answers)
    assert general[BASE]["loss"] == pytest.approx(base_loss, rel=1e-4)
    assert lost.loss_increase.low < lost.loss_increase.value < lost.loss_increase.high


def test_the_page_shows_what_was_lost_and_says_where_nothing_was_measured(run_dir, tmp_path):
    page = write_report(run_dir).read_text()
    assert "Forgetting</h2>" in page and "With the adapter" in page
    assert f"All {len(list_scored_prompts())} general prompts" in page
    without = copy_real_run(get_tiny_base(), tmp_path / "without", "score_general_prompts=false")
    assert Run(without).forgetting is None
    assert "score_general_prompts=true" in write_report(without).read_text()


def test_scoring_changes_no_byte_of_the_adapter(tmp_path):
    options = ("lora_dropout=0.1", "epochs=2")
    runs = [
        copy_real_run(get_tiny_base(), tmp_path / str(score), *options, f"score_general_prompts={score}")
        for score in ("true", "false")
    ]
    adapters = [(one / "last/adapter_model.safetensors").read_bytes() for one in runs]
    assert adapters[0] == adapters[1]
    assert Run(runs[0]).forgetting.adapter == "last"  # without validation rows there is no best


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_no_more_prompts_are_scored_than_the_budget_pays_for(kind):
    tokenizer = load_tokenizer(get_tiny_base(), chat_template="chatml")
    given = {"tokenizer": tokenizer, "max_seq_len": 512, "generation": GENERATION_COSTS[kind]}
    always = GENERATION_COSTS[kind].always_covered
    for tokens in (0.1, 1e3, 3e4, 6e4, 1e6):
        plan = plan_forgetting(score="auto", training_tokens=tokens, **given)
        assert plan.share * tokens <= max(MAX_SHARE * tokens, always)
        assert len(plan.prompts) >= MIN_PROMPTS if plan.prompts else "score_general_prompts=true" in plan.describe()
        assert bool(plan.prompts) == (kind == "cuda" or tokens > 5e4), "on a GPU all take a second or two"
    assert plan.prompts == list_scored_prompts()
    told = plan_forgetting(score=True, training_tokens=1e3, **given)
    assert told.prompts == list_scored_prompts() and told.share > MAX_SHARE
    assert not plan_forgetting(score=False, training_tokens=1e9, **given).prompts
    short = plan_forgetting(score=True, training_tokens=1e9, **given | {"max_seq_len": ANSWER_TOKENS + 8})
    assert not short.prompts and "max_seq_len=40" in short.describe()


def test_mixed_prompts_are_other_ones_than_the_scored():
    assert not set(list_mixed_prompts()) & set(list_scored_prompts())
    assert len(set(list_mixed_prompts())) == len(list_mixed_prompts())


def make_forgetting(divergence: float) -> Forgetting:
    one = GeneralAnswer("Why?", "So.", (1, 2), (3, 4), 0.5, 0.5 + divergence, 2 * divergence, 1)
    return Forgetting("best", (one,) * 8)


def test_a_damaged_file_is_one_line_that_names_it(tmp_path):
    write_forgetting(tmp_path, make_forgetting(0.2))
    assert read_forgetting(tmp_path) == make_forgetting(0.2), "negative control"
    path = tmp_path / "forgetting.json"
    whole = json.loads(path.read_text())
    no_ids = [{**one, "answer_ids": []} for one in whole["answers"]]
    for damage in ({"answers": []}, {"answers": ["x"]}, {"answers": no_ids}, {"adapter": 3}):
        path.write_text(json.dumps(whole | damage))
        with pytest.raises(ValueError, match=r"forgetting\.json") as error:
            read_forgetting(tmp_path)
        assert "\n" not in str(error.value)


def test_a_notable_loss_brings_advice_that_is_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    little, much = make_forgetting(NOTABLE_DIVERGENCE / 2), make_forgetting(2 * NOTABLE_DIVERGENCE)
    for forgetting in (None, little):
        situation = make_situation(tmp_path, "epochs=3", forgetting=forgetting)
        assert not any("general prompts" in one.reason for one in advise_label(GOOD_FIT, situation))
    situation = make_situation(tmp_path, "epochs=3", "learning_rate=1e-3", forgetting=much)
    advice = advise_label(GOOD_FIT, situation)
    assert advice[0].command.startswith("tune2gguf export")
    mixed, slower, shorter = (one.changes for one in advice[1:4])
    assert slower == {"learning_rate": 5e-4} and shorter == {"epochs": 2}
    assert mixed["dataset.sources"][-1]["rows"] == round(GENERAL_SHARE * 90 + 0.5)
    make_rows, _ = advice[1].command.split(" && ")
    assert make_rows == f"tune2gguf remind '{situation.run_dir}'"
    assert "general prompts" in advice[1].reason
    assert mixed in list_changes(advise_label(OVERFITTING, situation))
    assert mixed not in list_changes(advise_label(UNDERFITTING, situation))


def test_the_command_that_mixes_general_rows_in_is_accepted(tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    situation = make_situation(tmp_path, forgetting=make_forgetting(1.0))
    (tmp_path / "my run" / "general.jsonl").write_text('{"messages": []}\n')
    words = shlex.split(advise_label(GOOD_FIT, situation)[1].command.split(" && ")[1])
    config = load_config(words[words.index("--config") :])
    assert not check_values(config)
    assert config.dataset.files is None and config.dataset.validation_files is None
    own, general = config.dataset.sources
    assert own.validation_files and general.validation_split == 0
    again = make_situation(tmp_path, name="mixed", forgetting=make_forgetting(1.0))
    again.config["dataset"] = {"files": None, "sources": [{"files": ["runs/x/general.jsonl"]}]}
    assert not any("make_general_rows" in one.command for one in advise_label(GOOD_FIT, again))


def test_general_rows_are_the_mixed_prompts_whose_answers_ended(run_dir):
    """The base's answers do not depend on the adapter that the run's model is loaded with."""
    path, num_rows, num_left_out = make_general_rows(open_run(run_dir))
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert num_rows == len(rows) > 0 and num_rows + num_left_out == len(list_mixed_prompts())
    assert {asked["content"] for asked, _ in rows} <= set(list_mixed_prompts())
    assert all(reply["content"].strip() and reply["role"] == "assistant" for _, reply in rows)
    first = path.read_bytes()
    shutil.rmtree(run_dir / "best")
    make_general_rows(open_run(run_dir))
    assert path.read_bytes() == first
