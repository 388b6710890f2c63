"""Sample replies during training: greedy, and the model is unchanged afterwards."""

import pytest
import torch

from tests.conftest import TINY_TIED, write_tiny_base
from tune2gguf.base.load import load_base
from tune2gguf.model.llama import CausalLM, lora_llama, prepare_training
from tune2gguf.model.lora import LoRALinear, initialize_adapters
from tune2gguf.tokenizer.conversation import Conversation, Message
from tune2gguf.tokenizer.tokenizer import load_tokenizer
from tune2gguf.train.samples import answer_prompts, choose_prompts, describe_prompts
from tune2gguf.train.seeds import capture_random_state

CPU = torch.device("cpu")
MAX_TOKENS = 40


def make_conversation(question: str) -> Conversation:
    return Conversation((Message("user", question), Message("assistant", f"I say: {question}")))


CONVERSATIONS = [
    Conversation(text="The ferry leaves at nine."),
    make_conversation("When does the ferry leave?"),
    make_conversation("Why? " * 200),
    make_conversation("And the dogs?"),
    make_conversation("Who is Marlo?"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "tiny", TINY_TIED)


@pytest.fixture
def tokenizer(base):
    return load_tokenizer(base, chat_template="chatml")


def load_model(base, **options) -> CausalLM:
    """Load the base with a non-zero adapter, in training mode."""
    model = lora_llama(
        str(base),
        architecture=None,
        lora_rank=4,
        lora_alpha=4,
        lora_dropout=0.5,
        lora_attn_modules=["q_proj", "v_proj"],
        apply_lora_to_mlp=True,
        max_seq_len=256,
    )
    prepare_training(model, **({"compile": False, "enable_activation_checkpointing": False} | options))
    load_base(model, str(base), device=CPU, base_weights="fp32", show=False)
    initialize_adapters(model, 0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.lora_b.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model.train()


def answer_without_cache(model: CausalLM, tokenizer, prompt) -> list[int]:
    """Generate greedily, recomputing the whole row for each token."""
    ids = tokenizer.encode_prompt([Message(turn["role"], turn["content"]) for turn in prompt.messages])
    begin = len(ids)
    with torch.no_grad():
        while len(ids) - begin < MAX_TOKENS and (len(ids) == begin or ids[-1] not in tokenizer.stop_ids):
            hidden = model.compute_hidden(torch.tensor([ids]))[0, -1]
            ids.append(int((hidden @ model.head_weight.T).argmax()))
    return ids[begin:]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_answers_are_the_likeliest_tokens_without_dropout(base, tokenizer, is_checkpointed):
    model = load_model(base, enable_activation_checkpointing=is_checkpointed)
    prompts = choose_prompts(CONVERSATIONS, tokenizer, num_samples=3, max_seq_len=256)
    answers = answer_prompts(
        model, tokenizer, prompts, max_seq_len=256, max_tokens=MAX_TOKENS, step=0, epoch=0, device=CPU
    )
    model.eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = answer_without_cache(model, tokenizer, prompt)
        ended = ids[-1] in tokenizer.stop_ids
        assert (answer.reply, answer.ended_by_itself) == (tokenizer.decode(ids[:-1] if ended else ids), ended)
    assert len({answer.reply for answer in answers}) == 3, "negative control: answers depend on the prompt"
    assert [answer.row for answer in answers] == [1, 3, 4]
    assert [answer.reference for answer in answers[:1]] == ["I say: When does the ferry leave?"]


def test_model_and_random_numbers_are_left_as_they_were(base, tokenizer):
    model, untouched = load_model(base), load_model(base)
    torch.manual_seed(1)
    before = capture_random_state(CPU)
    prompts = choose_prompts(CONVERSATIONS, tokenizer, num_samples=2, max_seq_len=256)
    answer_prompts(model, tokenizer, prompts, max_seq_len=256, max_tokens=MAX_TOKENS, step=0, epoch=0, device=CPU)
    after = capture_random_state(CPU)
    assert torch.equal(before.pop("torch"), after.pop("torch")) and before == after
    assert all(module.training for module in model.modules())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in untouched.named_modules()]
    attentions = [[vars(layer.attn).keys() for layer in one.decoder.layers] for one in (model, untouched)]
    assert attentions[0] == attentions[1]
    losses = []
    for one in (model, untouched):
        torch.manual_seed(2)
        losses.append(one(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 8]])))
    assert torch.equal(*losses)


def test_what_leaves_no_room_or_has_no_prompt_is_passed_over_and_said(tokenizer):
    prompts = choose_prompts(CONVERSATIONS, tokenizer, num_samples=9, max_seq_len=256)
    assert [prompt.row for prompt in prompts] == [1, 3, 4]
    assert describe_prompts(prompts, num_samples=9, num_validation_rows=5, max_tokens=40) == (
        "samples: 3 validation prompts, answered before training, after each epoch and at the end, "
        "in at most 40 tokens; num_samples=9, but no other validation row is a conversation with room for a reply"
    )
    assert describe_prompts(prompts, num_samples=3, num_validation_rows=5, max_tokens=40).endswith(
        "in at most 40 tokens"
    )
    assert describe_prompts([], num_samples=0, num_validation_rows=5, max_tokens=40) is None
    assert describe_prompts([], num_samples=3, num_validation_rows=0, max_tokens=40) is None
    # A prompt that fills max_seq_len leaves no room.
    longest = max(prompt.num_tokens for prompt in prompts)
    fitting = choose_prompts(CONVERSATIONS, tokenizer, num_samples=9, max_seq_len=longest)
    assert fitting == [prompt for prompt in prompts if prompt.num_tokens < longest] != prompts
