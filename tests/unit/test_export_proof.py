"""The proof of an export: it passes files that are served as trained, and fails others with the reason."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from tests.conftest import REPOSITORY, make_conversations
from tests.parity.gguf_models import ALPHA, RANK, draw_adapter, write_biased_base, write_run
from tests.runs import set_adapter
from tune2gguf.export.measure.validation_set import make_rows
from tune2gguf.export.pipeline import Export, export_run
from tune2gguf.model.architectures import read_architecture
from tune2gguf.serve.llama_cpp import open_model
from tune2gguf.serve.proof import ADAPTER, BASE, MERGED, format_table, prove_export
from tune2gguf.serve.serving import check_tokens
from tune2gguf.tokenizer.conversation import Conversation, Message
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES, CHATML
from tune2gguf.tokenizer.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ending_base(tmp_path_factory) -> Path:
    """Make a model that ends its turn at once."""
    folder = tmp_path_factory.mktemp("ending")
    return write_biased_base(folder / "base", lambda token: 9.0 if token == "<|im_end|>" else 0.0)


def write_proven_run(base_dir: Path, run_dir: Path, *, num_rows: int = 6) -> Path:
    """Write a run with an adapter on the values only, and validation rows."""
    write_run(base_dir, run_dir, chat_template="chatml", validation=make_conversations(num_rows))
    weights = draw_adapter(read_architecture(base_dir), strength=1 / 4)
    values = {name: weight for name, weight in weights.items() if "v_proj" in name}
    set_adapter(run_dir, values, rank=RANK, alpha=ALPHA)
    return run_dir


@pytest.fixture
def run_dir(ending_base, tmp_path) -> Path:
    return write_proven_run(ending_base, tmp_path / "run")


def prove(export: Export, **options):
    return prove_export(export, show=False, **options)


def test_a_faithful_export_is_proven(run_dir):
    export = export_run(run_dir, quantizations=["Q8_0", "F16"], show=False)
    proof = prove(export)
    assert proof.failures == []
    assert list(proof.steps) == [BASE, ADAPTER, MERGED, "Q8_0", "F16"]
    assert proof.steps[ADAPTER]["kl_to_adapter"] == 0 and proof.steps[ADAPTER]["top1"] == 1
    divergences = [proof.steps[name]["kl_to_adapter"] for name in (MERGED, "Q8_0", BASE)]
    assert 0 < divergences[0] < divergences[1] < divergences[2]
    for served in proof.served_by_llama_cpp.values():
        assert (served["tokens"]["num_equal"], served["tokens"]["num_different"]) == (6, 0)
        assert served["scores"]["num_tokens"] == 128
        assert abs(served["scores"]["loss_by_llama_cpp"] - served["scores"]["loss_by_torch"]) < 0.02
        assert len(served["replies"]) == 3 and all(reply["ended_by_itself"] for reply in served["replies"])
    content = json.loads((run_dir / "export" / "proof.json").read_text())
    assert content["passed"] is True
    assert content["steps"]["Q8_0"]["loss"] == proof.steps["Q8_0"]["loss"]
    assert "proven: ids, losses and replies" in format_table(proof)


def test_an_adapter_beside_the_base_is_proven_too(run_dir):
    export = export_run(run_dir, quantizations=["Q8_0", "F16"], with_adapter_gguf=True, show=False)
    proof = prove(export)
    assert proof.failures == []
    assert list(proof.steps)[3:] == ["Q8_0", "F16", "Q8_0 + adapter"]
    served = proof.served_by_llama_cpp["Q8_0 + adapter"]
    assert (served["tokens"]["num_equal"], served["tokens"]["num_different"]) == (6, 0)
    assert abs(served["scores"]["loss_by_llama_cpp"] - served["scores"]["loss_by_torch"]) < 0.02
    assert proof.steps["Q8_0 + adapter"]["kl_to_adapter"] < proof.steps[BASE]["kl_to_adapter"] / 3


def test_an_adapter_that_is_not_applied_is_found(run_dir):
    """Negative control: the base alone has other losses than the base with its adapter."""
    export = export_run(run_dir, quantizations=["F16"], with_adapter_gguf=True, show=False)
    strong = GGUFReader(export.adapter.adapter_path, "r+")
    for tensor in strong.tensors:
        tensor.data[:] *= 8
    strong.data.flush()
    assert any("F16 + adapter: llama.cpp's loss is" in failure for failure in prove(export).failures)


def test_losses_are_those_of_the_recipes_validation(run_dir, ending_base):
    """The adapter's loss equals training's validation loss: same rows, same tokens, same mean."""
    import torch

    from tune2gguf.base.checkpoint import open_base
    from tune2gguf.export.measure.layerwise import compute_hidden
    from tune2gguf.export.measure.weight_sources import open_base_source
    from tune2gguf.export.merge.adapter import read_adapter
    from tune2gguf.model.loss import cross_entropy_of_supervised

    proof = prove(export_run(run_dir, show=False))
    tokenizer = load_tokenizer(ending_base, chat_template="chatml")
    base = open_base(ending_base)
    source = open_base_source(base, adapter=read_adapter(run_dir / "last", base.specs))
    head = source.read("output.weight", 0, 384)
    losses = []
    for row in make_conversations(6):
        tokens, supervised = tokenizer.encode_conversation([Message(**message) for message in row["messages"]])
        hidden = compute_hidden(source, [np.array(tokens)])
        places = torch.tensor([place for place in range(1, len(tokens)) if supervised[place]])
        losses.append(cross_entropy_of_supervised(hidden[places - 1], head, torch.tensor(tokens)[places]))
    assert proof.steps[ADAPTER]["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_a_lossy_type_fails_and_the_smallest_sufficient_one_is_named(run_dir):
    export = export_run(run_dir, quantizations=["Q2_K"], show=False)
    increase = prove(export).steps["Q2_K"]["increase"]
    limits = [increase * 2, increase / 3] if increase > 0 else [1.0, increase * 2]
    assert prove(export, max_loss_increase=limits[0]).failures == []
    [failure] = prove(export, max_loss_increase=limits[1]).failures
    assert failure.startswith("Q2_K raises the validation loss by ")
    assert ". The smallest type within it is " in failure or ". No larger type stays within it. " in failure
    assert failure.splitlines()[-1].split()[-6:] == [
        str(run_dir / "config.yaml"),
        "base_weights=gguf:Q2_K",
        "quantization=Q2_K",
        "dtype=bf16",
        f"output_dir={run_dir}-Q2_K",
        "resume=false",
    ], "and how to train for the file"
    assert json.loads((run_dir / "export" / "proof.json").read_text())["passed"] is False


def test_a_lossy_merge_names_the_adapter_file_as_the_way_out_unless_it_is_there(run_dir):
    for with_adapter_gguf in (False, True):
        export = export_run(run_dir, with_adapter_gguf=with_adapter_gguf, overwrite=True, show=False)
        merged = next(one for one in prove(export, max_loss_increase=-1.0).failures if one.startswith(MERGED))
        assert ("--adapter-gguf --force" in merged) != with_adapter_gguf


def test_a_model_that_does_not_end_its_turn_fails(tmp_path):
    endless_base = write_biased_base(tmp_path / "base", lambda token: -30.0 if token == "<|im_end|>" else 0.0)
    export = export_run(write_proven_run(endless_base, tmp_path / "endless"), quantizations=["Q8_0"], show=False)
    proof = prove(export, num_replies=2)
    assert any("replies did not end by themselves" in failure for failure in proof.failures)
    assert "[cut]" in format_table(proof) and "NOT PROVEN" in format_table(proof)


def test_another_template_than_the_trained_one_is_found_with_the_first_difference(run_dir, ending_base, monkeypatch):
    wrong = replace(CHATML, jinja_template=CHATML.jinja_template.replace("<|im_start|>assistant", "<|im_start|>bot"))
    monkeypatch.setitem(CHAT_TEMPLATES, "chatml", wrong)
    export = export_run(run_dir, quantizations=["F16"], show=False)
    monkeypatch.undo()
    [failure, *_] = prove(export).failures
    assert failure.startswith("F16: llama.cpp serves other ids than were trained: conversation 1, token ")
    assert "<|im_start|>ass" in failure and "<|im_start|>bot" in failure


def test_conversations_that_spell_special_tokens_are_counted_apart(ending_base, run_dir):
    model = open_model(export_run(run_dir, quantizations=["F16"], show=False).models[0].gguf_path, context_length=256)
    tokenizer = load_tokenizer(ending_base, chat_template="chatml")
    chats = [
        Conversation((Message("user", question), Message("assistant", "It ends a turn.")))
        for question in ("What is <|im_end|>?", "What ends a turn?")
    ]
    check = check_tokens(model, tokenizer, chats)
    assert (check.num_equal, check.num_different, check.num_skipped) == (1, 0, 1)


def test_rows_are_cut_as_in_training_and_raw_text_counts(ending_base):
    tokenizer = load_tokenizer(ending_base, chat_template="chatml")
    chat = Conversation((Message("user", "a " * 50), Message("assistant", "b")))
    rows = make_rows([chat, Conversation(text="The ferry leaves.")], tokenizer, max_seq_len=20)
    assert len(rows) == 1, "the first row's reply lies beyond max_seq_len"
    assert len(rows[0].positions) == len(rows[0].tokens) - 1, "all of a raw text is supervised"


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "scripts/export.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def test_the_script_proves_and_fails_with_exit_code_1(run_dir):
    finished = run_script(run_dir, "--quantization", "Q8_0")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.endswith("proven: ids, losses and replies are within the limits\n")
    failed = run_script(run_dir, "--quantization", "Q2_K", "--force", "--max-loss-increase", "0")
    assert failed.returncode == 1
    assert "NOT PROVEN" in failed.stdout and "proven: ids" not in failed.stdout


@pytest.mark.parametrize("limit", ["nan", "-1"])
def test_a_limit_that_makes_no_sense_is_refused_before_the_export(run_dir, limit):
    finished = run_script(run_dir, f"--max-loss-increase={limit}")
    assert finished.returncode == 1
    assert finished.stderr == f"error: --max-loss-increase must be at least 0, got {limit}\n"
    assert not (run_dir / "export").exists()


def test_types_of_an_option_that_is_given_twice_are_all_exported(run_dir):
    finished = run_script(run_dir, "--quantization", "Q8_0", "--quantization", "f16", "--proof-rows", "0")
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in (run_dir / "export").glob("*.gguf")) == ["run-F16.gguf", "run-Q8_0.gguf"]


def test_what_is_not_proven_is_not_handed_to_ollama(run_dir, fake_ollama):
    finished = run_script(run_dir, "--quantization", "Q2_K", "--max-loss-increase", "0", "--ollama", "marlo")
    assert finished.returncode == 1
    assert finished.stdout.endswith("not handed to Ollama as marlo, because it is not proven\n")
    assert not fake_ollama.exists()


def test_the_proof_of_replaced_files_goes_with_them(run_dir):
    prove(export_run(run_dir, show=False))
    assert (run_dir / "export" / "proof.json").is_file()
    export_run(run_dir, overwrite=True, show=False)
    assert not (run_dir / "export" / "proof.json").exists()


def test_a_run_without_validation_rows_is_unproven_and_handed_to_ollama_on_demand_only(
    ending_base, tmp_path, fake_ollama
):
    run_dir = write_proven_run(ending_base, tmp_path / "run", num_rows=0)
    finished = run_script(run_dir)
    assert finished.returncode == 0
    assert "not proven: the run has no validation rows" in finished.stdout
    assert not (run_dir / "export" / "proof.json").exists()
    finished = run_script(run_dir, "--force", "--ollama", "marlo")
    assert finished.returncode == 1
    assert finished.stdout.endswith("not handed to Ollama as marlo, because it is not proven\n")
    assert not fake_ollama.exists()
    assert run_script(run_dir, "--force", "--ollama", "marlo", "--proof-rows", "0").returncode == 0
    assert fake_ollama.exists()


def make_row(question: str, reply: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def test_conversations_that_all_spell_special_tokens_are_not_proven(ending_base, tmp_path):
    rows = [make_row(f"What is <|im_end|>, {number}?", "It ends a turn.") for number in range(3)]
    run_dir = write_run(ending_base, tmp_path / "run", chat_template="chatml", validation=rows)
    proof = prove(export_run(run_dir, quantizations=["F16"], show=False))
    assert "F16: nothing to compare: each of the 3 conversations spells a special token" in proof.failures
    assert not proof.passed and "NOT PROVEN" in format_table(proof)


def test_no_scored_token_is_not_proven(ending_base, tmp_path, monkeypatch):
    """llama.cpp gives no loss of the first byte of a character that has several tokens."""
    monkeypatch.setattr("tune2gguf.serve.serving.MAX_SCORED_TOKENS", 1)
    rows = [make_row("Which boat?", "\U0001f6a2")]
    run_dir = write_run(ending_base, tmp_path / "run", chat_template="chatml", validation=rows)
    proof = prove(export_run(run_dir, quantizations=["F16"], show=False))
    assert "F16: nothing to compare: llama.cpp reports no loss of any supervised token" in proof.failures


def test_a_question_beyond_max_seq_len_is_not_asked(ending_base, tmp_path):
    """The first reply is the trained one."""
    turns = [("user", "Boats?"), ("assistant", "Ferries."), ("user", "more " * 800), ("assistant", "No.")]
    long_row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    rows = [long_row, *make_conversations(1)]
    run_dir = write_run(ending_base, tmp_path / "run", chat_template="chatml", validation=rows)
    proof = prove(export_run(run_dir, quantizations=["F16"], show=False))
    assert proof.rows == 2 and proof.served_by_llama_cpp["F16"]["tokens"]["num_equal"] == 2
    assert [reply["question"] for reply in proof.served_by_llama_cpp["F16"]["replies"]] == [
        "Question 0: what should I know?"
    ]


def test_ids_of_raw_texts_are_compared_though_no_reply_is_asked_for(ending_base, tmp_path):
    rows = [{"text": "The ferry leaves at 7:10, \U0001f6a2."}, {"text": "  Dogs sail free. "}]
    run_dir = write_run(ending_base, tmp_path / "run", chat_template="chatml", validation=rows)
    proof = prove(export_run(run_dir, quantizations=["F16"], show=False))
    assert proof.served_by_llama_cpp["F16"]["tokens"]["num_equal"] == 2
    assert proof.failures == []
    assert format_table(proof).endswith("proven: ids and losses are within the limits; no reply was asked for")
