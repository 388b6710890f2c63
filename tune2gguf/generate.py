"""Greedy or drawn replies of a model in torch, as it is trained: base and unmerged adapter, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune2gguf.data.messages import Message
from tune2gguf.llama_cpp import Reply
from tune2gguf.tokenizers import ChatTokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tune2gguf.models import CausalLM


@dataclass(frozen=True)
class AdapterModel:
    """A base with its adapter, in evaluation mode and with caches; made by `load_adapter_model` or `lend_caches`.

    Attributes:
        max_seq_len: tokens of prompt and reply that the caches hold
        agree: takes the token that this process chose, returns the one that all processes go on with
    """

    model: CausalLM
    tokenizer: ChatTokenizer
    max_seq_len: int
    device: torch.device
    agree: Callable[[int], int] = lambda token: token

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answer a conversation of {"role", "content"} messages; arguments as in `llama_cpp.LlamaCppModel.chat`.

        Raises:
            ValueError: if the conversation leaves no room for a reply within max_seq_len
        """
        prompt = self.tokenizer.encode_prompt([Message(turn["role"], turn["content"]) for turn in messages])
        room = self.max_seq_len - len(prompt)
        if room <= 0:
            raise ValueError(f"the conversation has {len(prompt)} tokens; the model was trained for {self.max_seq_len}")
        stream = _TextStream(self.tokenizer, on_text)
        ids = self._generate(prompt, min(max_tokens, room), temperature, seed, stream)
        ended = bool(ids) and ids[-1] in self.tokenizer.stop_ids
        text = self.tokenizer.decode(ids[:-1] if ended else ids)
        return Reply(text=text, ended_by_itself=ended, num_prompt_tokens=len(prompt), num_reply_tokens=len(ids))

    def _generate(
        self, prompt: list[int], max_tokens: int, temperature: float, seed: int, stream: _TextStream
    ) -> list[int]:
        """Return the drawn ids; the last one is the end of the turn unless the limit came first."""
        import torch

        decoder, ids = self.model.decoder, []
        generator = torch.Generator(self.device).manual_seed(seed)
        causal = torch.ones(self.max_seq_len, self.max_seq_len, dtype=torch.bool, device=self.device).tril()
        new = torch.tensor(prompt, device=self.device)
        decoder.reset_caches()
        with torch.no_grad():
            while len(ids) < max_tokens and (not ids or ids[-1] not in self.tokenizer.stop_ids):
                begin = len(prompt) + len(ids) - len(new)
                places = torch.arange(begin, begin + len(new), device=self.device)
                logits = self.model.predict_next(new[None], mask=causal[None, places], input_pos=places[None])[0]
                ids.append(self.agree(_draw(logits, temperature, generator)))
                stream.add(ids[-1])
                new = torch.tensor(ids[-1:], device=self.device)
        return ids


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int((logits / temperature).softmax(-1).multinomial(1, generator=generator))


@dataclass
class _TextStream:
    """Hands the text of growing ids on as it becomes whole; a character can take several tokens."""

    tokenizer: ChatTokenizer
    on_text: Callable[[str], None] | None
    ids: tuple[int, ...] = ()
    num_shown: int = 0

    def add(self, token: int) -> None:
        if self.on_text is None or token in self.tokenizer.stop_ids:
            return
        self.ids = (*self.ids, token)
        text = self.tokenizer.decode(self.ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and len(text) > self.num_shown:
            self.on_text(text[self.num_shown :])
            self.num_shown = len(text)


@contextmanager
def lend_caches(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    *,
    max_seq_len: int,
    device: torch.device,
    agree: Callable[[int], int] = lambda token: token,
) -> Iterator[AdapterModel]:
    """Let a model that is being trained reply within this context; it is left as it was entered."""
    import torch
    from torchtune.modules import MultiHeadAttention
    from torchtune.modules.common_utils import local_kv_cache

    decoder, was_training = model.decoder, model.training
    model.eval()
    dtype = decoder.tok_embeddings.weight.dtype
    # Compiled layers compute as they are written here: a graph for a growing cache would be compiled for a few replies.
    with (
        torch.compiler.set_stance("force_eager"),
        local_kv_cache(decoder, batch_size=1, device=device, dtype=dtype, decoder_max_seq_len=max_seq_len),
    ):
        yield AdapterModel(model, tokenizer, max_seq_len, device, agree)
    for module in decoder.modules():
        if isinstance(module, MultiHeadAttention):
            # torchtune leaves an empty submodule, at which a compiled layer would be compiled again.
            del module.kv_cache
            module.kv_cache = None
    model.train(was_training)
