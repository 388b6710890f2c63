"""Chat tokenizers: text to token ids and back, for Llama 3 (tokenizer.json or tokenizer.model) and ChatML models.

The ids equal llama.cpp's after it has rendered the chat template, by three rules:

- Content is rendered unchanged. White space around contents is removed when rows are read, and no template strips any:
  every engine renders a message alike.
- The text between two special tokens is tokenized as one string, as in the server. One exception: a reply is tokenized
  apart from the header before it, because the model generates it after a prompt that ends with the header. The ids
  differ only if a reply starts with white space, and no row's does.
- Special tokens spelled in content stay text. The server would read them as special tokens, but a reply about
  `<|eot_id|>` must not teach the model to end its turn there. data.json counts such rows.

torchtune's Llama3Tokenizer is not used: it supervises the assistant's header, names three special tokens differently
from the published files, knows no ChatML, and costs four seconds to import.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tune2gguf.commands import format_script
from tune2gguf.tokenizer.conversation import Message
from tune2gguf.tokenizer.llama3 import read_llama3_tokenizer_json
from tune2gguf.tokenizer.templates import CHAT_TEMPLATES, ChatTemplate

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

# The first of these in a base folder is used; Meta's repositories have the last.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
# Padding is never attended to and never supervised: any id is correct, these are the customary ones.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<|end_of_text|>")
_HEADERS = ("system", "user", "assistant", "ipython")
Tools = Sequence[Mapping[str, Any]]  # definitions, each {"type": "function", "function": {…}}
END_OF_TEXT_TOKENS = ("<|end_of_text|>", "<|endoftext|>")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation: one special token, or text that is tokenized as one string."""

    text: str
    is_special: bool
    supervised: bool


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer and its chat template. Made by load_tokenizer."""

    backend: Tokenizer
    chat_template: ChatTemplate
    special_ids: dict[str, int]  # every special token of the vocabulary
    fingerprint: str  # of the tokenizer's file and the chat template, which determine the ids

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled tokenizer: the library's pickle loses encode_special_tokens."""
        vars(self).update(state)
        self.backend.encode_special_tokens = True

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def pad_id(self) -> int:
        return next(
            (self.special_ids[token] for token in _PAD_TOKENS if token in self.special_ids), self.end_of_turn_id
        )

    @property
    def end_of_turn_id(self) -> int:
        return self.special_ids[self.chat_template.end_of_turn]

    @property
    def end_of_text_ids(self) -> list[int]:
        """The ids that end a raw text in this vocabulary."""
        return [self.special_ids[token] for token in END_OF_TEXT_TOKENS if token in self.special_ids]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids at which generation ends."""
        return tuple(self.special_ids[token] for token in self.chat_template.stops if token in self.special_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text. Nothing is added, and special tokens spelled in it stay text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def encode_conversation(self, messages: Sequence[Message], tools: Tools = ()) -> tuple[list[int], list[bool]]:
        """Return ids and supervised flags. Only replies, calls and their end-of-turn tokens are supervised."""
        [(ids, supervised)] = self.encode_segments([self.render_conversation(messages, tools)])
        return ids.tolist(), supervised.tolist()

    def encode_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Return the ids of the conversation so far and of the next reply's header."""
        [(ids, _)] = self.encode_segments([self.render_prompt(messages, tools)])
        return ids.tolist()

    def encode_document(self, text: str) -> tuple[list[int], list[bool]]:
        """Return ids and supervised flags of raw text. All of it and its end-of-text token are supervised."""
        [(ids, supervised)] = self.encode_segments([self.render_document(text)])
        return ids.tolist(), supervised.tolist()

    def encode_segments(self, rows: Sequence[Sequence[Segment]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ids (int32) and supervised flags (bool) of each row. Many rows in one call use all cores."""
        # The template's texts, and often the system prompt, repeat in every row: tokenize each text once.
        texts = [*dict.fromkeys(segment.text for row in rows for segment in row if not segment.is_special)]
        encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        ids_of = {text: encoding.ids for text, encoding in zip(texts, encodings, strict=True)}
        return [self._collect(row, ids_of) for row in rows]

    def _collect(self, row: Sequence[Segment], ids_of: dict[str, list[int]]) -> tuple[np.ndarray, np.ndarray]:
        pieces = [[self.special_ids[segment.text]] if segment.is_special else ids_of[segment.text] for segment in row]
        lengths = [len(piece) for piece in pieces]
        ids = np.fromiter(chain.from_iterable(pieces), np.int32, count=sum(lengths))
        return ids, np.repeat(np.array([segment.supervised for segment in row], bool), lengths)

    def render_conversation(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """Return the segments of a whole conversation, as it is trained."""
        segments = self._split(self.chat_template.beginning)
        separator = self._split(self.chat_template.turn_separator)
        for message in self.write_out(messages, tools):
            is_trained = message.role == "assistant" and message.is_trained
            segments += self._headers[message.role]
            segments.append(Segment(message.content, is_special=False, supervised=is_trained))
            segments.append(Segment(self.chat_template.end_of_turn, is_special=True, supervised=is_trained))
            segments += separator
        return join_texts(segments)

    def write_out(self, messages: Sequence[Message], tools: Tools = ()) -> list[Message]:
        """Return plain messages: tools, calls, results and the format's system prefix become text."""
        return self.chat_template.write_out(messages, tools, self.chat_template.system_prefix)

    def render_prompt(self, messages: Sequence[Message], tools: Tools = ()) -> list[Segment]:
        """Return the segments of a conversation and of the next reply's header, as it is served."""
        unanswered = [replace(message, is_trained=False) for message in messages]
        return join_texts(self.render_conversation(unanswered, tools) + self._headers["assistant"])

    def render_document(self, text: str) -> list[Segment]:
        """Return the segments of raw text, between the template's beginning and the vocabulary's end-of-text token."""
        ends = [token for token in END_OF_TEXT_TOKENS if token in self.special_ids][:1]
        return [
            *self._split(self.chat_template.beginning),
            Segment(text, is_special=False, supervised=True),
            *(Segment(end, is_special=True, supervised=True) for end in ends),
        ]

    def find_spelled_special(self, text: str) -> str | None:
        """Return a special token of the vocabulary that the text spells out, or None."""
        found = self._special_pattern.search(text)
        return None if found is None else found[0]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.special_ids)))

    @cached_property
    def _headers(self) -> dict[str, list[Segment]]:
        start, end = self.chat_template.role_start, self.chat_template.role_end
        return {role: self._split(start + role + end) for role in _HEADERS}

    def _split(self, text: str) -> list[Segment]:
        """Split the format's own text, never content, at its special tokens."""
        parts = [part for part in re.split(r"(<\|\w+\|>)", text) if part]
        return [Segment(part, is_special=part in self.special_ids, supervised=False) for part in parts]


def join_texts(segments: Sequence[Segment]) -> list[Segment]:
    """Join adjacent texts of equal supervision, to be tokenized as one string. Drop empty ones."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and not (last.is_special or segment.is_special) and last.supervised == segment.supervised:
            joined[-1] = replace(last, text=last.text + segment.text)
        elif segment.text:
            joined.append(segment)
    return joined


def load_tokenizer(base_dir: str | Path, *, chat_template: str) -> ChatTokenizer:
    """Load a base folder's tokenizer.json, or else its tokenizer.model of Llama 3 (at the top or in original/).

    Raises:
        ValueError: if there is no such file, it cannot be read, or it lacks a special token of the chat template
    """
    if chat_template not in CHAT_TEMPLATES:
        raise ValueError(f"chat_template={chat_template!r} is not one of {', '.join(CHAT_TEMPLATES)}")
    path = find_tokenizer_file(base_dir)
    backend = _load_backend(path)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    special_ids = {
        token.content: id_ for id_, token in sorted(backend.get_added_tokens_decoder().items()) if token.special
    }
    tokenizer = ChatTokenizer(
        backend,
        CHAT_TEMPLATES[chat_template],
        special_ids,
        fingerprint=_compute_fingerprint(path, CHAT_TEMPLATES[chat_template]),
    )
    needed = _find_special_tokens(tokenizer.chat_template)
    missing = [token for token in needed if token not in special_ids]
    if missing:
        fitting = [name for name, other in CHAT_TEMPLATES.items() if _find_special_tokens(other) <= special_ids.keys()]
        way_out = f"; chat_template={' or '.join(fitting)} would fit" if fitting else ""
        raise ValueError(f"{path}: has no special token {', '.join(missing)} of chat_template={chat_template}{way_out}")
    return tokenizer


def _compute_fingerprint(path: Path, chat_template: ChatTemplate) -> str:
    values = vars(chat_template) | {"write_out": chat_template.write_out.__name__}
    return hashlib.sha256(path.read_bytes() + repr(values).encode()).hexdigest()


def find_tokenizer_file(base_dir: str | Path) -> Path:
    """Return the tokenizer.json or tokenizer.model of a base folder.

    Raises:
        ValueError: if there is none
    """
    if not Path(base_dir).is_dir():
        raise ValueError(f"no base model in {base_dir}. Get it with:\n  {format_script('download')} --config …")
    for name in TOKENIZER_FILES:
        if (Path(base_dir) / name).is_file():
            return Path(base_dir) / name
    raise ValueError(f"{base_dir}: has no tokenizer; looked for {', '.join(TOKENIZER_FILES)}")


def _find_special_tokens(chat_template: ChatTemplate) -> set[str]:
    text = chat_template.beginning + chat_template.role_start + chat_template.role_end + chat_template.end_of_turn
    return set(re.findall(r"<\|\w+\|>", text))


def looks_special(token: str) -> bool:
    """Return whether llama.cpp's converter treats an added token as a control token even if it is not marked so."""
    return token.startswith("<|") and token.endswith("|>")


def _list_added(backend: Tokenizer) -> list[AddedToken]:
    return list(backend.get_added_tokens_decoder().values())


def _load_backend(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if path.suffix == ".model":
        return Tokenizer.from_str(read_llama3_tokenizer_json(path))
    try:
        text = path.read_text(encoding="utf-8")
        backend = Tokenizer.from_str(text)
        if any(not token.special and looks_special(token.content) for token in _list_added(backend)):
            content = json.loads(text)
            for token in content["added_tokens"]:
                token["special"] = token["special"] or looks_special(token["content"])
            backend = Tokenizer.from_str(json.dumps(content))
        return backend
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise ValueError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from None
