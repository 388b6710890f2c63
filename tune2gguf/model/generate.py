"""Generation in torch with base and unmerged adapter: greedy or sampled, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tune2gguf.tokenizer.conversation import Message
from tune2gguf.tokenizer.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tune2gguf.model.caches import KVCaches
    from tune2gguf.model.llama import CausalLM


@dataclass(frozen=True)
class AdapterModel:
    """A base with its adapter, in evaluation mode, with KV caches; from `load_adapter_model` or `kv_caches`.

    Attributes:
        caches: of the model
        max_seq_len: limit on the tokens of prompt plus reply
        agree: maps this process's chosen tokens to those that all processes continue with
    """

    caches: KVCaches
    tokenizer: ChatTokenizer
    max_seq_len: int
    device: torch.device
    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens

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
            ValueError: if the prompt has max_seq_len tokens or more
        """
        prompt = self.tokenizer.encode_prompt([Message(turn["role"], turn["content"]) for turn in messages])
        room = self.max_seq_len - len(prompt)
        if room <= 0:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens, the limit is max_seq_len={self.max_seq_len}; shorten it"
            )
        stream = _TextStream(self.tokenizer, on_text)
        ids = self._generate(prompt, min(max_tokens, room), temperature, seed, stream)
        return make_reply(self.tokenizer, prompt, ids)

    def _generate(
        self, prompt: list[int], max_tokens: int, temperature: float, seed: int, stream: _TextStream
    ) -> list[int]:
        """Return the sampled ids; they end with a stop token unless the limit came first."""
        import torch

        ids, generator = [], torch.Generator(self.device).manual_seed(seed)
        causal = torch.ones(self.max_seq_len, self.max_seq_len, dtype=torch.bool, device=self.device).tril()
        new = torch.tensor(prompt, device=self.device)
        self.caches.clear()
        with torch.no_grad():
            while len(ids) < max_tokens and (not ids or ids[-1] not in self.tokenizer.stop_ids):
                begin = len(prompt) + len(ids) - len(new)
                places = torch.arange(begin, begin + len(new), device=self.device)
                logits = self.caches.predict_next(new[None], mask=causal[None, places], input_pos=places[None])[0]
                ids += self.agree([_draw(logits, temperature, generator)])
                stream.add(ids[-1])
                new = torch.tensor(ids[-1:], device=self.device)
        return ids


def make_reply(tokenizer: ChatTokenizer, prompt: Sequence[int], ids: Sequence[int]) -> Reply:
    """Return the reply of these ids; it ended by itself if the last id is a stop token."""
    ended = bool(ids) and ids[-1] in tokenizer.stop_ids
    text = tokenizer.decode(ids[:-1] if ended else ids)
    return Reply(text=text, ended_by_itself=ended, num_prompt_tokens=len(prompt), num_reply_tokens=len(ids))


def generate_together(
    adapter_model: AdapterModel, prompts: Sequence[Sequence[int]], *, max_tokens: int
) -> list[list[int]]:
    """Return the greedy reply to each prompt, all in one batch.

    Prompts are left-padded, so all end at the same place of the caches. No token attends to padding.

    Args:
        adapter_model: its caches have one row per prompt and hold the longest prompt plus `max_tokens`
        prompts: token ids, each fewer than adapter_model.max_seq_len
        max_tokens: limit on a reply; prompt plus reply never exceed adapter_model.max_seq_len either

    Returns:
        the ids of each reply; they end with a stop token unless a limit came first
    """
    import torch

    device, longest = adapter_model.device, max(map(len, prompts))
    paddings = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    places = torch.arange(longest + max_tokens, device=device)
    # Padding attends to itself: a softmax over nothing would be NaN.
    mask = (places[None, None] >= paddings[:, None, None]) & (places[None, None] <= places[None, :, None])
    mask |= torch.eye(len(places), dtype=torch.bool, device=device)
    positions = (places[None] - paddings[:, None]).clamp(0, adapter_model.max_seq_len - 1)
    limits = [min(max_tokens, adapter_model.max_seq_len - len(prompt)) for prompt in prompts]
    replies: list[list[int]] = [[] for _ in prompts]
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    new, begin = torch.tensor(padded, device=device), 0
    open_rows = set(range(len(prompts)))
    adapter_model.caches.clear()
    with torch.no_grad():
        while open_rows:
            now = slice(begin, begin + new.shape[1])
            logits = adapter_model.caches.predict_next(new, mask=mask[:, now], input_pos=positions[:, now])
            chosen = adapter_model.agree(logits.argmax(-1).tolist())
            for row in sorted(open_rows):
                replies[row].append(chosen[row])
                if chosen[row] in adapter_model.tokenizer.stop_ids or len(replies[row]) == limits[row]:
                    open_rows.remove(row)
            new, begin = torch.tensor(chosen, device=device)[:, None], now.stop
    return replies


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int((logits / temperature).softmax(-1).multinomial(1, generator=generator))


@dataclass
class _TextStream:
    """Pass generated text on once its last character is complete; a character can take several tokens."""

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
def kv_caches(
    model: CausalLM,
    tokenizer: ChatTokenizer,
    *,
    max_seq_len: int,
    device: torch.device,
    batch_size: int,
    num_places: int,
    agree: Callable[[list[int]], list[int]] = lambda tokens: tokens,
) -> Iterator[AdapterModel]:
    """Give a model KV caches, so it can generate in the middle of training; restore it on exit.

    Args:
        max_seq_len: limit on the tokens of prompt plus reply
        batch_size: rows of the caches
        num_places: tokens per row of the caches
    """
    from tune2gguf.model.caches import KVCaches

    was_training = model.training
    model.eval()
    caches = KVCaches(model, batch_size=batch_size, num_places=num_places, device=device)
    yield AdapterModel(caches, tokenizer, max_seq_len, device, agree)
    caches.detach()
    model.train(was_training)


@dataclass(frozen=True)
class Reply:
    """A reply: its text, and whether the model ended its turn or the limit cut it."""

    text: str
    ended_by_itself: bool
    num_prompt_tokens: int
    num_reply_tokens: int
    tool_calls: tuple[dict[str, Any], ...] = ()  # name and arguments each, if the engine parses calls
