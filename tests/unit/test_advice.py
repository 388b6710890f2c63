"""Each advice is a command that parses to the run's own config with exactly the changes that it names."""

import shlex
from dataclasses import replace

import pytest
from omegaconf import OmegaConf

from tests.conftest import REPOSITORY
from tests.unit.synthetic_curves import approach, make_curves
from tune2gguf.commands import format_overrides
from tune2gguf.config import check_values, load_config, read_config
from tune2gguf.runs.config_file import flatten_config
from tune2gguf.runs.curves import Curves
from tune2gguf.runs.folder import write_config
from tune2gguf.verdict.advice import ADDITIONAL, EPOCHS, LEARNING_RATE, Situation, advise, describe_change
from tune2gguf.verdict.judge import GOOD_FIT, INCONCLUSIVE, OVERFITTING, UNDERFITTING, Verdict, judge

CURVES = make_curves(approach(8))  # best at the end of its four epochs of 25 steps
FREE = [f"runs/mine-{number}" for number in range(2, 10)]


def make_situation(tmp_path, *overrides, name="my run", **options) -> Situation:
    """Return the facts of a run of the quickstart's config, with config.yaml as the recipe writes it."""
    config = read_config(REPOSITORY / "examples/quickstart/lora.yaml", list(overrides))
    run_dir = tmp_path / name
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(run_dir, config)
    data = {"training": {"rows": 90}, "validation": {"rows": 10}, "rows_truncated": []}
    resolved = OmegaConf.to_container(config, resolve=True)
    return Situation(str(run_dir), resolved, options.pop("data", data), options.pop("free_dirs", FREE), **options)


def with_best_at(step: int) -> Curves:
    """Return curves with the lowest validation loss at `step`."""
    best = next(one for one in CURVES.validations if one.step == step)
    lowest = replace(best, loss=0.1)
    return Curves(CURVES.training, tuple(lowest if one is best else one for one in CURVES.validations))


def advise_label(label, situation, *, curves=CURVES, figures=None):
    return advise(Verdict(label, ("because",), figures or {}), curves, situation)


def list_changes(advice):
    return [one.changes for one in advice]


def test_overfitting_has_the_guides_answers_in_order(tmp_path):
    situation = make_situation(tmp_path, "epochs=4", "learning_rate=1e-3", "lora_alpha=32")
    advice = advise_label(OVERFITTING, situation, curves=with_best_at(40))
    assert list_changes(advice) == [
        {"epochs": 2},
        {"learning_rate": 5e-4},
        {"lora_alpha": 16},
        {"lora_dropout": 0.2},
        {"weight_decay": 0.1},
        {},
    ]
    assert [one.guide_section for one in advice[:4]] == [EPOCHS, LEARNING_RATE, ADDITIONAL, ADDITIONAL]
    assert "step 40" in advice[0].reason
    assert advice[-1].command == f"python scripts/export.py {shlex.quote(situation.run_dir)}"


def test_a_best_in_the_last_epoch_leaves_the_epochs_alone(tmp_path):
    situation = make_situation(tmp_path, "epochs=4")
    assert "epochs" not in list_changes(advise_label(OVERFITTING, situation, curves=with_best_at(90)))[0]


def test_fewer_epochs_take_the_warmup_along_where_it_would_outlast_them(tmp_path):
    situation = make_situation(tmp_path, "epochs=4", "warmup_steps=40")
    assert list_changes(advise_label(OVERFITTING, situation, curves=with_best_at(20)))[0] == {
        "epochs": 1,
        "warmup_steps": 2,
    }


def test_underfitting_has_the_guides_answers_in_order(tmp_path):
    truncated = [{"tokens": 700}, {"tokens": 900}]
    data = {"training": {"rows": 90}, "validation": {"rows": 10}, "rows_truncated": truncated}
    situation = make_situation(tmp_path, "epochs=3", "learning_rate=1e-4", data=data)
    assert list_changes(advise_label(UNDERFITTING, situation)) == [
        {"epochs": 6},
        {"learning_rate": 2e-4},
        {"lora_dropout": 0.0},
        {"weight_decay": 0.001},
        {"lora_rank": 32, "lora_alpha": 32},
        {"lora_alpha": 32},
        {"max_seq_len": 900},
    ]


@pytest.mark.parametrize(("further_gain", "epochs"), [(0.2, 6), (0.3, 12)])
def test_a_curve_far_from_flat_asks_for_four_times_the_epochs(tmp_path, further_gain, epochs):
    situation = make_situation(tmp_path, "epochs=3", "learning_rate=1e-3")
    advice = advise_label(UNDERFITTING, situation, figures={"further_gain": further_gain})
    assert list_changes(advice)[0] == {"epochs": epochs}
    assert ("30%" in advice[0].reason) == (further_gain == 0.3)


@pytest.mark.parametrize("rate", [1e-6, 5e-5])
def test_a_rate_below_the_guides_starting_point_comes_before_more_epochs(tmp_path, rate):
    situation = make_situation(tmp_path, "epochs=3", f"learning_rate={rate}")
    assert list_changes(advise_label(UNDERFITTING, situation))[:2] == [{"learning_rate": 1e-4}, {"epochs": 6}]


def test_epochs_that_were_cut_short_are_made_whole_first(tmp_path):
    situation = make_situation(tmp_path, "max_steps_per_epoch=5")
    assert list_changes(advise_label(UNDERFITTING, situation))[0] == {"max_steps_per_epoch": None}


def test_values_at_their_limit_are_not_advised_beyond_it(tmp_path):
    loose = make_situation(tmp_path, "lora_dropout=0", "weight_decay=0", "lora_alpha=32")
    changed = {key for changes in list_changes(advise_label(UNDERFITTING, loose)) for key in changes}
    assert not changed & {"lora_dropout", "weight_decay", "max_seq_len"}
    tight = make_situation(tmp_path, "lora_dropout=0.3", "weight_decay=0.1", "epochs=1", "lora_alpha=8")
    assert list_changes(advise_label(OVERFITTING, tight)) == [{"learning_rate": 5e-4}, {}]


def test_good_fit_is_exported_or_tried_with_the_next_larger_model(tmp_path):
    situation = make_situation(tmp_path, "max_seq_len=300", "seed=7")
    stop, larger = advise_label(GOOD_FIT, situation)
    assert stop.command.startswith("python scripts/export.py")
    download, train = larger.command.split(" && ")
    assert download == "python scripts/download.py --config configs/llama3_2_1b/lora.yaml"
    config = load_config(shlex.split(train)[3:])
    check_values(config)
    assert (config.model.architecture, config.max_seq_len, config.seed) == ("llama3_2_1b", 300, 7)
    assert config.dataset.files == ["examples/quickstart/train.jsonl"]
    assert config.dataset.validation_split is None
    assert config.learning_rate == 1e-4
    four_bit = make_situation(tmp_path, "base_weights=nf4", "model.architecture=llama3_2_1b")
    assert "configs/llama3_2_3b/qlora.yaml" in advise_label(GOOD_FIT, four_bit)[1].command
    assert len(advise_label(GOOD_FIT, make_situation(tmp_path, "model.architecture=llama3_1_8b"))) == 1


INCONCLUSIVE_CASES = {
    "no validation rows": (Curves(CURVES.training, ()), {}, [{"dataset.validation_split": 0.1}]),
    "diverged": (CURVES, {"diverged": 1}, [{"learning_rate": 5e-4}]),
    "too few points": (
        Curves(CURVES.training, (CURVES.base, CURVES.final)),
        {},
        [{"eval_every_n_steps": 10}],
    ),
    "more rows than there are": (
        CURVES,
        {"rows_needed": 30},
        [
            {
                "dataset.files": ["examples/quickstart/train.jsonl", "examples/quickstart/heldout.jsonl"],
                "dataset.validation_files": None,
                "dataset.validation_split": 0.3,
            }
        ],
    ),
}


@pytest.mark.parametrize(("curves", "figures", "expected"), INCONCLUSIVE_CASES.values(), ids=INCONCLUSIVE_CASES)
def test_what_cannot_be_judged_is_made_judgeable(curves, figures, expected, tmp_path):
    # There are ten validation rows, and the curves measure all of them.
    data = {"training": {"rows": 60}, "validation": {"rows": 40}, "rows_truncated": []}
    if "rows_needed" in figures:
        data = {"training": {"rows": 90}, "validation": {"rows": 10}, "rows_truncated": []}
    situation = make_situation(tmp_path, data=data)
    assert list_changes(advise_label(INCONCLUSIVE, situation, curves=curves, figures=figures)) == expected


def test_sources_hold_out_each_its_share_of_the_rows_that_are_needed(tmp_path):
    sources = [{"files": "a.jsonl", "weight": 2}, {"files": ["b.jsonl"], "validation_files": "c.jsonl"}]
    own = ["dataset.files=null", "dataset.validation_files=null", *format_overrides({"dataset.sources": sources})]
    advice = advise_label(INCONCLUSIVE, make_situation(tmp_path, *own), figures={"rows_needed": 30})
    expected = [
        {"files": ["a.jsonl"], "weight": 2, "validation_split": 0.3},
        {"files": ["b.jsonl", "c.jsonl"], "validation_split": 0.3},
    ]
    assert list_changes(advice) == [{"dataset.sources": expected}]


def test_validation_rows_that_were_not_measured_come_before_new_ones(tmp_path):
    data = {"training": {"rows": 900}, "validation": {"rows": 100}, "rows_truncated": []}
    situation = make_situation(tmp_path, data=data)
    assert list_changes(advise_label(INCONCLUSIVE, situation, figures={"rows_needed": 60})) == [{"max_val_rows": 60}]


@pytest.mark.parametrize("label", [OVERFITTING, UNDERFITTING, INCONCLUSIVE])
def test_command_changes_what_it_says_and_nothing_else(label, tmp_path):
    """Flat keys reach component keys, too. The folder's name has a space."""
    situation = make_situation(
        tmp_path, "epochs=4", "lora_dropout=0.15", "lora_alpha=32", "learning_rate=3.7e-6", "resume=auto"
    )
    own = flatten_config(situation.config)
    advice = advise_label(label, situation, curves=with_best_at(40), figures={"rows_needed": 30})
    trained = [one for one in advice if one.changes]
    assert trained
    for one, folder in zip(trained, FREE, strict=False):
        words = shlex.split(one.command)
        assert words[:3] == ["tune", "run", "recipes/lora_finetune.py"]
        config = load_config(words[3:])
        check_values(config)
        now = flatten_config(OmegaConf.to_container(config, resolve=True))
        changed = {key: now.get(key) for key in now.keys() | own.keys() if now.get(key) != own.get(key)}
        assert changed.pop("output_dir") == folder
        assert changed.pop("parent_run") == situation.run_dir
        assert changed.pop("resume") is False
        followers = {
            "learning_rate": "optimizer.lr",
            "weight_decay": "optimizer.weight_decay",
            "warmup_steps": "lr_scheduler.num_warmup_steps",
            **{key: f"model.{key}" for key in ("lora_rank", "lora_alpha", "lora_dropout", "max_seq_len")},
        }
        expected = one.changes | {followers[key]: value for key, value in one.changes.items() if key in followers}
        assert changed == pytest.approx(expected) if label != INCONCLUSIVE else changed == expected


def test_as_many_processes_are_asked_for_as_the_run_had(tmp_path):
    (first, *_) = advise_label(UNDERFITTING, make_situation(tmp_path, num_processes=4))
    assert first.command.startswith("tune run --nproc_per_node 4 recipes/lora_finetune.py")


def test_what_was_tried_without_gain_is_not_advised_again(tmp_path):
    tried = frozenset({frozenset({("epochs", "up")}), frozenset({("lora_rank", "up"), ("lora_alpha", "up")})})
    situation = make_situation(tmp_path, "learning_rate=1e-4", tried=tried)
    changes = list_changes(advise_label(UNDERFITTING, situation))
    assert {"learning_rate": 2e-4} in changes and {"lora_alpha": 32} in changes
    assert not any("epochs" in one or "lora_rank" in one for one in changes)


def test_a_config_that_was_run_is_not_advised_but_halfway_in_the_rate_is(tmp_path):
    situation = make_situation(tmp_path, "learning_rate=2e-4")
    past = [flatten_config(situation.config) | {"learning_rate": 1e-4}]
    changes = list_changes(advise_label(OVERFITTING, replace(situation, past=past)))
    assert {"learning_rate": 1e-4} not in changes
    assert {"learning_rate": 1.41e-4} in changes


def test_when_everything_was_tried_it_says_so(tmp_path):
    ups = [{"epochs"}, {"learning_rate"}, {"lora_rank", "lora_alpha"}, {"lora_alpha"}]
    tried = {frozenset((key, "up") for key in keys) for keys in ups}
    tried |= {frozenset({(key, "down")}) for key in ("lora_dropout", "weight_decay")}
    situation = make_situation(tmp_path, tried=frozenset(tried))
    (last,) = advise_label(UNDERFITTING, situation)
    assert last.changes == {} and "were tried without gain" in last.reason


def test_change_is_described_by_key_and_direction():
    before = {"learning_rate": 1e-4, "epochs": 3, "scheduler": "cosine", "seed": 1, "output_dir": "a"}
    after = {"learning_rate": 2e-4, "epochs": 1, "scheduler": "linear", "seed": 2, "output_dir": "b"}
    assert describe_change(before, after) == {("learning_rate", "up"), ("epochs", "down"), ("scheduler", "to linear")}


def test_advice_on_real_verdicts_is_never_empty(tmp_path):
    for path in (approach(8), approach(0.5), lambda progress: 1 + abs(progress - 0.3)):
        curves = make_curves(path)
        assert advise(judge(curves), curves, make_situation(tmp_path))
