"""The real SmolLM2 through scripts/export.py: proof, adapter file, merged folder, chat."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.parity.gguf_models import write_smollm2_run
from tune2gguf.serve.llama_cpp import open_model

pytestmark = pytest.mark.slow
QUESTION = "How many days are in a week?"
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    # Questions that the untuned model answers in one sentence.
    answers = {QUESTION: "There are 7 days in a week.", "What color is the sky?": "The sky is blue."}
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in answers.items()
    ]
    return write_smollm2_run(tmp_path_factory.mktemp("real"), validation=rows)


@pytest.fixture(scope="module")
def exported(run_dir) -> str:
    """Return the script's output. Its files are in the run's export folder."""
    finished = run_script("export.py", run_dir, "--quantization", "Q8_0", "F32", "--adapter-gguf", "--merged-hf")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "scripts" / name, *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)


def test_the_real_model_is_proven(exported, run_dir):
    assert exported.endswith("proven: ids, losses and replies are within the limits\n")
    proof = json.loads((run_dir / "export" / "proof.json").read_text())
    assert list(proof["steps"]) == ["base", "adapter", "merged bf16", "Q8_0", "F32", "Q8_0 + adapter"]
    assert proof["rows"] == 2
    replies = proof["served_by_llama_cpp"]["F32"]["replies"]
    assert "7" in replies[0]["reply"] and all(reply["ended_by_itself"] for reply in replies)


def test_the_real_merged_folder_gives_the_logits_of_peft(exported, run_dir, peft):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged_dir = run_dir / "export" / f"{run_dir.name}-merged"
    tokens = AutoTokenizer.from_pretrained(merged_dir).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(run_dir.parent / "base", dtype=torch.float32)
        plain = base(tokens).logits
        expected = peft.PeftModel.from_pretrained(base, run_dir / "last")(tokens).logits
        found = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32)(tokens).logits
    rounding, effect = (found - expected).std(), (plain - expected).std()
    assert rounding < 0.1 * effect, "the merged weights differ by their rounding; the adapter's effect is the control"


def test_the_real_adapter_file_on_the_base_answers_as_the_merged_file(exported, run_dir, tmp_path):
    from tune2gguf.export.pipeline import export_base

    base_path = tmp_path / "base.gguf"
    export_base(run_dir.parent / "base", base_path, quantization="F32", chat_template="chatml", show=False)
    name = run_dir.name
    model = open_model(base_path, adapter_path=run_dir / "export" / f"{name}-adapter.gguf")
    merged = open_model(run_dir / "export" / f"{name}-F32.gguf")
    assert model.chat(MESSAGES, max_tokens=12).text == merged.chat(MESSAGES, max_tokens=12).text


def test_the_real_model_can_be_talked_to_as_file_and_as_adapter(exported, run_dir):
    answers = [
        run_script("chat.py", run_dir, "--once", QUESTION, "--max-tokens", "12", *options)
        for options in (["--gguf", run_dir / "export" / f"{run_dir.name}-F32.gguf"], ["--adapter"])
    ]
    assert all("7" in answer.stdout for answer in answers), [answer.stderr for answer in answers]
