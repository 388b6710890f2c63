"""Every reader of a run's folder gets hostile content unchanged: line separators, quotes, markup, an unusual name."""

import html
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.runs import HOSTILE_NAME, HOSTILE_SYSTEM_PROMPT, HOSTILE_VALIDATION, run_recipe
from tune2gguf.export.pipeline import export_run
from tune2gguf.report.compare import find_runs, group_runs, write_comparison
from tune2gguf.runs.ledger import read_entries
from tune2gguf.runs.run import Run, open_run
from tune2gguf.runs.validation_rows import read_validation_rows
from tune2gguf.serve.chat import open_chat_model
from tune2gguf.serve.proof import ADAPTER, prove_export

# Each text is the first of two turns, which puts it into a prompt; the last reply is the reference.
QUESTIONS = [row["messages"][-2]["content"] for row in HOSTILE_VALIDATION]
REFERENCES = [row["messages"][-1]["content"] for row in HOSTILE_VALIDATION]


@pytest.fixture
def run_dir(hostile_run, tmp_path) -> Path:
    return Path(shutil.copytree(hostile_run, tmp_path / "copies" / hostile_run.name))


@pytest.fixture(scope="module")
def exported(hostile_run, tmp_path_factory):
    run_dir = Path(shutil.copytree(hostile_run, tmp_path_factory.mktemp("exported") / hostile_run.name))
    return export_run(run_dir, quantizations=["F32"], show=False)


def run_script(name: str, *arguments: str | Path) -> str:
    command = [sys.executable, REPOSITORY / "scripts" / name, *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_validation_rows_are_those_that_were_written(hostile_run):
    read = read_validation_rows(hostile_run)
    assert [[{"role": one.role, "content": one.content} for one in row.messages] for row in read] == [
        row["messages"] for row in HOSTILE_VALIDATION
    ]
    assert Run(hostile_run).curves.final.rows == len(HOSTILE_VALIDATION)


def test_samples_ask_and_quote_the_rows(hostile_run):
    samples = Run(hostile_run).samples
    assert len(samples) == 3 * len(HOSTILE_VALIDATION)
    for sample in samples:
        *prompt, reference = HOSTILE_VALIDATION[sample.row]["messages"]
        assert (list(sample.prompt), sample.reference) == (prompt, reference["content"])


@pytest.mark.parametrize("by_script", [False, True], ids=["recipe", "scripts/report.py"])
def test_report_shows_every_question_and_reply(run_dir, by_script):
    if by_script:
        (run_dir / "report.html").unlink()
        assert run_script("report.py", run_dir).endswith(f"wrote {run_dir / 'report.html'}\n")
    page = html.unescape((run_dir / "report.html").read_bytes().decode())
    for text in (*QUESTIONS, *REFERENCES, HOSTILE_SYSTEM_PROMPT, HOSTILE_NAME):
        assert spell(text) in page
    assert "Not in this report" not in page and "<script>alert" not in (run_dir / "report.html").read_text()


def spell(text: str) -> str:
    """Return the text with escapes for characters that a page would hide or interpret."""
    return text.translate({ord(character): repr(character)[1:-1] for character in "\r\x85\u2028\u2029\u202e"})


def test_comparison_ranks_it_on_all_its_rows(run_dir, tmp_path):
    shutil.copytree(run_dir, run_dir.with_name(f"{HOSTILE_NAME} <2>"))
    (group,) = group_runs(find_runs(run_dir.parent))
    assert (group.num_rows, len(group.runs)) == (len(HOSTILE_VALIDATION), 2)
    page = html.unescape(write_comparison([group], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert HOSTILE_NAME in page and f"{HOSTILE_NAME} <2>" in page


def test_export_serves_what_was_trained(exported):
    proof = prove_export(exported, num_replies=1, show=False)
    tokens = proof.served_by_llama_cpp["F32"]["tokens"]
    assert (tokens["num_equal"], tokens["num_different"], tokens["num_skipped"]) == (len(HOSTILE_VALIDATION), 0, 0)
    assert proof.steps[ADAPTER]["loss"] == pytest.approx(Run(exported.run.run_dir).curves.best.loss, abs=1e-5)
    modelfile = exported.models[0].modelfile_path.read_bytes().decode()
    assert "SYSTEM" not in modelfile and r"You are Marlo.\U00002028Say \"aye\"" in modelfile
    assert f"# {HOSTILE_NAME}\n" in exported.model_card_path.read_text(encoding="utf-8")


@pytest.mark.parametrize("uses_adapter", [False, True], ids=["GGUF", "adapter"])
def test_chat_answers_what_was_asked(exported, uses_adapter):
    model = open_chat_model(open_run(exported.run.run_dir), uses_adapter=uses_adapter)
    (*prompt, _) = HOSTILE_VALIDATION[2]["messages"]
    reply = model.chat(prompt, max_tokens=8, temperature=0.0)
    expected = Run(exported.run.run_dir).samples[-len(HOSTILE_VALIDATION) :][2].reply
    assert reply.text and (reply.text.startswith(expected) or expected.startswith(reply.text.rstrip("\ufffd")))


def test_chat_asks_with_the_trained_system_prompt_unless_told_another(exported):
    run_dir, question = exported.run.run_dir, {"role": "user", "content": "When does the ferry leave?"}
    model = open_chat_model(open_run(run_dir))
    for options, system_prompt in (((), HOSTILE_SYSTEM_PROMPT), (("--system", "Only numbers."), "Only numbers.")):
        said = run_script("chat.py", run_dir, "--once", question["content"], "--max-tokens", "12", *options)
        asked = [{"role": "system", "content": system_prompt}, question]
        assert said == model.chat(asked, max_tokens=12, temperature=0.0).text + "\n"
        assert said != model.chat([question], max_tokens=12, temperature=0.0).text + "\n"  # negative control


def test_before_and_after_asks_every_question(exported):
    shown = run_script("show_result.py", exported.run.run_dir, "--questions", len(QUESTIONS))
    assert shown.startswith("validation loss: ")
    for question in QUESTIONS:
        assert f"Q       {question}\n" in shown


def test_ollama_is_asked_what_the_rows_ask(run_dir, fake_ollama):
    shown = run_script("export.py", run_dir, "--ollama", "marlo", "--proof-rows", "0")
    _, *asked = (json.loads(line) for line in fake_ollama.read_text().splitlines())
    assert [request["messages"][-1]["content"] for _, request in asked] == QUESTIONS[:3]
    answers = "".join(f"Q {question}\nA Ahoy!\n" for question in QUESTIONS[:3])
    assert shown.endswith(f"made marlo in Ollama 0.32.15\n{answers}")


def test_ledger_and_verdict_lead_to_a_command_that_parses(hostile_run):
    (entry,), problems = read_entries(hostile_run.parent)
    conclusion = Run(hostile_run).conclusion
    assert (entry.run, entry.verdict, problems) == (HOSTILE_NAME, conclusion.verdict.label, [])
    assert [one["command"] for one in entry.advice] == [one.command for one in conclusion.advice]
    assert any(str(hostile_run) in argument for one in conclusion.advice for argument in shlex.split(one.command))


def test_resume_with_more_epochs_goes_on_in_the_same_folder(run_dir):
    before = (run_dir / "heldout.jsonl").read_bytes()
    steps = len(Run(run_dir).curves.training)
    config = ("--config", str(run_dir / "config.yaml"))
    said = run_recipe(*config, f"output_dir={run_dir}", "epochs=3", "resume=auto")
    assert "epochs raised from 2 to 3" in said
    run = Run(run_dir)
    assert len(run.curves.training) == steps // 2 * 3 and run.config["epochs"] == 3
    assert (run_dir / "heldout.jsonl").read_bytes() == before
    assert run.samples[-1].reference == REFERENCES[-1]
