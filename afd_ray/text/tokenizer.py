"""Text to token ids and back, from the tokenizer files of a Hugging Face directory."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from afd_ray.text.chat_template import ChatTemplate

_SPECIAL_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(RuntimeError):
    """One line: the file, and what is wrong with it."""


class Tokenizer:
    """Encodes prompts, renders chats, and tells the bytes that each token stands for."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        self._backend = backend
        self._chat_template = chat_template
        self._added = {index: token.content.encode() for index, token in backend.get_added_tokens_decoder().items()}
        self._special = frozenset(index for index, token in backend.get_added_tokens_decoder().items() if token.special)
        self._byte_level = "ByteLevel" in _decoder_types(json.loads(backend.to_str()).get("decoder"))
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer | None":
        """None when the directory has no tokenizer.json; TokenizerError when a tokenizer file is broken."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, _load_chat_template(directory))

    @property
    def size(self) -> int:
        """Token ids that the tokenizer knows; a model's vocabulary may be larger."""
        return int(self._backend.get_vocab_size())

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises ValueError for text that is not valid Unicode (a lone surrogate)."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("text must be valid Unicode, got a lone surrogate") from error
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of a continuation; special tokens are left out."""
        return b"".join(self.text_bytes(token_id) for token_id in token_ids).decode(errors="replace")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt text of a conversation; ValueError (one line) when the model has no template or it refuses the messages."""
        if self._chat_template is None:
            raise ValueError("the model has no chat template")
        return self._chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def text_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text: nothing for special and unknown ones."""
        return b"" if token_id in self._special else self.token_bytes(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of the token itself, special ones too; they need not be whole UTF-8 characters."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def _find_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece = self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if piece is None:
            return b""
        if self._byte_level:
            return _byte_level_bytes(piece)
        if match := _BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()


def _decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    if not decoder:
        return set()
    return {str(decoder.get("type"))}.union(*(_decoder_types(inner) for inner in decoder.get("decoders", ())))


def _byte_level_bytes(piece: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary: itself, or the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _load_chat_template(directory: Path) -> ChatTemplate | None:
    path = directory / "tokenizer_config.json"
    config = _read_config(path)
    own_file = directory / "chat_template.jinja"
    try:
        special = {key: _token_text(config[key]) for key in _SPECIAL_TOKEN_KEYS if config.get(key)}
        source = config.get("chat_template")
        if own_file.is_file():
            path, source = own_file, own_file.read_text(encoding="utf-8")
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source}
            source = named.get("default")
        return ChatTemplate(source, special) if source else None
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: special tokens or chat template cannot be read ({error})") from error


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path}: must hold a JSON object")
    return config


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
