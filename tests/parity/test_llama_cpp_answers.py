"""llama.cpp in this process gives transformers' distribution for the same weights."""

import json
import math
import urllib.error
import urllib.request

import pytest
import torch

from tests.conftest import TINY_TIED, TINY_UNTIED, write_tiny_base
from tests.parity.gguf_models import write_run
from tests.parity.make_gguf_digests import write_hf_folder
from tune2gguf.export.pipeline import export_base, export_run
from tune2gguf.serve.llama_cpp import LlamaCppModel, choose_num_threads, open_model

MESSAGES = [{"role": "user", "content": " When does the ferry leave? "}]


@pytest.fixture(scope="module", params=["tied with rope scaling", "untied"])
def served(request, tmp_path_factory):
    """Load a run's F32 GGUF in llama.cpp, and its merged folder in transformers."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("served")
    base_dir = write_tiny_base(folder / "base", TINY_UNTIED if request.param == "untied" else TINY_TIED)
    run_dir = write_run(base_dir, folder / "run", chat_template="chatml")
    gguf_path = export_run(run_dir, quantizations=["F32"], show=False).models[0].gguf_path
    write_hf_folder(run_dir, folder / "merged", is_merged=True)
    reference = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32)
    return open_model(gguf_path, context_length=512), reference


def ask_log_probabilities(model: LlamaCppModel, tokens: list[int], *, count: int) -> torch.Tensor:
    """Return llama.cpp's log-probabilities of the next token, [count]."""
    # The bias excludes end tokens and partial characters. Probabilities are those before the bias.
    request = {"prompt": tokens, "n_predict": 1, "n_probs": count, "temperature": 0, "logit_bias": [[40, 1000]]}
    found = model.post("/completion", request)["completion_probabilities"][0]["top_logprobs"]
    return torch.tensor([entry["logprob"] for entry in sorted(found, key=lambda entry: entry["id"])])


def test_next_token_distribution_is_that_of_transformers(served):
    model, reference = served
    tokens = [number * 7 % 384 for number in range(200)]
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        elsewhere = reference(torch.tensor([tokens[::-1]])).logits[0, -1].log_softmax(-1)
    found = ask_log_probabilities(model, tokens, count=384)
    assert (found - expected).abs().max() < 0.02, "llama.cpp's cache of keys and values is float16"
    assert (elsewhere - expected).abs().max() > 0.5, "negative control: another prompt gives another distribution"


def test_adapter_file_on_a_plain_base_gives_the_distribution_of_the_merged_weights(tmp_path, tiny_untied_base):
    run_dir = write_run(tiny_untied_base, tmp_path / "run", chat_template="chatml")
    exported = export_run(run_dir, quantizations=["F32"], with_adapter_gguf=True, show=False)
    base_path = exported.adapter.base_path
    tokens = [number * 7 % 384 for number in range(50)]
    plain, applied, merged = (
        ask_log_probabilities(open_model(path, context_length=256, adapter_path=adapter), tokens, count=384)
        for path, adapter in (
            (base_path, None),
            (base_path, exported.adapter.adapter_path),
            (exported.models[0].gguf_path, None),
        )
    )
    assert (applied - merged).abs().max() < 0.05, "merged weights are rounded to bfloat16"
    assert (plain - merged).abs().max() > 0.5, "negative control: the adapter changes the distribution"


def test_greedy_reply_is_that_of_transformers(served):
    model, reference = served
    prompt = model.tokenize(model.apply_template(MESSAGES))
    with torch.no_grad():
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    request = {"prompt": prompt, "n_predict": 12, "temperature": 0, "return_tokens": True}
    assert model.post("/completion", request)["tokens"] == expected[0, len(prompt) :].tolist()
    assert model.chat(MESSAGES, max_tokens=1).num_prompt_tokens == len(prompt)


def test_streamed_reply_is_the_whole_reply(served):
    model, _ = served
    pieces = []
    whole = model.chat(MESSAGES, max_tokens=8)
    streamed = model.chat(MESSAGES, max_tokens=8, on_text=pieces.append)
    assert streamed == whole
    assert "".join(pieces) == whole.text and len(pieces) > 1
    assert not whole.ended_by_itself and whole.num_reply_tokens == 8


def test_only_the_holder_of_the_key_is_answered(served):
    model, _ = served
    assert model.server.listening_address.startswith("http://127.0.0.1:")
    request = urllib.request.Request(
        model.server.listening_address + "/tokenize",
        data=json.dumps({"content": "secret"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request)


def test_too_long_a_conversation_is_refused_with_both_lengths(served):
    model, _ = served
    with pytest.raises(ValueError, match=r"exceeds the available context size \(512 tokens\)"):
        model.chat([{"role": "user", "content": "ferry " * 2000}])


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"x\.gguf: llama\.cpp cannot load it"):
        open_model(tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="no such file"):
        open_model(tmp_path / "y.gguf")


@pytest.mark.parametrize("quantization", ["Q4_K_M", "Q2_K", "IQ4_XS", "BF16"])
def test_llama_cpp_loads_the_type(tiny_base, tmp_path, quantization):
    path = export_base(
        tiny_base, tmp_path / "model.gguf", quantization=quantization, chat_template="chatml", show=False
    )
    model = open_model(path, context_length=256)
    log_probabilities = ask_log_probabilities(model, [1, 2, 3], count=384)
    assert math.isclose(log_probabilities.exp().sum(), 1, abs_tol=1e-3)


def test_threads_follow_from_the_files_size_and_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr("tune2gguf.serve.llama_cpp.count_cores", lambda: 4)
    path = tmp_path / "sparse.gguf"
    chosen = []
    for size in (1, 399_999_999, 500_000_000, 5_000_000_000):
        path.open("ab").truncate(size)
        chosen.append(choose_num_threads(path))
    assert chosen == [1, 1, 2, 4]
