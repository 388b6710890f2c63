"""The trained model as it was trained, base and unmerged adapter in torch, to be asked like the exported one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune2gguf.data.messages import Message
from tune2gguf.export.adapter import Adapter, read_adapter
from tune2gguf.export.run_folder import FinishedRun
from tune2gguf.llama_cpp import Reply
from tune2gguf.tokenizers import ChatTokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tune2gguf.models import CausalLM


@dataclass(frozen=True)
class AdapterModel:
    """A base with its adapter; made by `load_adapter_model`."""

    model: CausalLM
    tokenizer: ChatTokenizer
    max_seq_len: int
    device: torch.device

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
                logits = decoder(new[None], mask=causal[None, places], input_pos=places[None])[0, -1].float()
                ids.append(_draw(logits, temperature, generator))
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


def load_adapter_model(run: FinishedRun, *, show: bool = True) -> AdapterModel:
    """Load a run's base, in the precision it was trained with, and its adapter.

    Raises:
        ValueError: if base or adapter are missing or do not fit together
    """
    import torch

    from tune2gguf.checkpoints.base import open_base
    from tune2gguf.checkpoints.load import load_base
    from tune2gguf.models import LORA_ATTN_MODULES, lora_llama

    adapter = read_adapter(run.adapter_dir, open_base(run.base_dir).specs)
    parts = {name.split(".", 2)[2].removesuffix(".weight") for name in adapter.pairs}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = lora_llama(
        str(run.base_dir),
        architecture=None,
        lora_rank=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        lora_attn_modules=[name for name in LORA_ATTN_MODULES if f"attn.{name}" in parts],
        apply_lora_to_mlp=any(name.startswith("mlp.") for name in parts),
        max_seq_len=run.max_seq_len,
    )
    load_base(model, str(run.base_dir), device=device, base_weights=run.config["base_weights"], show=show)
    _fill_adapter(model, adapter)
    model.eval()
    with device:
        dtype = model.decoder.tok_embeddings.weight.dtype
        model.decoder.setup_caches(batch_size=1, dtype=dtype, decoder_max_seq_len=run.max_seq_len)
    tokenizer = load_tokenizer(run.base_dir, chat_format=run.chat_format.name)
    return AdapterModel(model, tokenizer, run.max_seq_len, device)


def _fill_adapter(model: CausalLM, adapter: Adapter) -> None:
    import torch

    from tune2gguf.lora import LoRALinear

    with torch.no_grad():
        for name, module in model.decoder.named_modules():
            if isinstance(module, LoRALinear):
                pair = adapter.pairs.get(f"{name}.weight")
                if pair is None:
                    module.lora_a.weight.zero_()
                    module.lora_b.weight.zero_()
                else:
                    module.lora_a.weight.copy_(torch.from_numpy(pair.lora_a))
                    module.lora_b.weight.copy_(torch.from_numpy(pair.lora_b))
