"""The demo model's byte-level tokenizer: a token a byte and a few marks of the conversation, as Hugging Face files."""

import json
from pathlib import Path
from typing import Any, Final

SPECIALS: Final = {"<|bos|>": 256, "<|end|>": 257, "<|user|>": 258, "<|assistant|>": 259, "<|system|>": 260, "<|pad|>": 261}
BOS, END, PAD = SPECIALS["<|bos|>"], SPECIALS["<|end|>"], SPECIALS["<|pad|>"]
VOCAB_SIZE: Final = 264
"""Two ids more than the tokenizer uses, for a multiple of 8."""
RESERVED: Final = {f"<|reserved_{i}|>": i for i in range(262, VOCAB_SIZE)}

CHAT_TEMPLATE: Final = (
    "{{ '<|bos|>' }}"
    "{% for message in messages %}"
    "{% set role = message['role'] if message['role'] in ['user', 'assistant'] else 'system' %}"
    "{{ '<|' + role + '|>' + (message['content'] or '') | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def encode(text: str) -> list[int]:
    """The UTF-8 bytes of a text without marks."""
    return list(text.encode())


def turn(role: str, text: str) -> list[int]:
    """One message as the chat template writes it."""
    return [SPECIALS[f"<|{role}|>"], *encode(text), END]


def chat_prompt(question: str) -> list[int]:
    """One question to the model, up to where it answers."""
    return [BOS, *turn("user", question), SPECIALS["<|assistant|>"]]


def plain_prompt(question: str) -> list[int]:
    """The question without marks; the answer begins with a space."""
    return encode(f"Q: {question}\nA:")


def decode(token_ids: list[int]) -> str:
    """The text of the byte tokens; marks are left out."""
    return bytes(token for token in token_ids if token < 256).decode(errors="replace")


def byte_names() -> list[str]:
    """The printable character that names each byte in a byte-level vocabulary, by byte.

    Printable Latin-1 bytes name themselves; the others take the code points from 256 on, in order.
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in own else next(spare)) for byte in range(256)]


def _added_token(content: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def tokenizer_json() -> dict[str, Any]:
    """The content of `tokenizer.json`: byte-level, no merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(content, token_id) for content, token_id in (SPECIALS | RESERVED).items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {name: byte for byte, name in enumerate(byte_names())}, "merges": []},
    }


def tokenizer_config() -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def generation_config() -> dict[str, Any]:
    """The content of `generation_config.json`."""
    return {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False}


def write_tokenizer(directory: Path) -> None:
    """Write the three files into an existing directory."""
    contents = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer_config(),
        "generation_config.json": generation_config(),
    }
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
