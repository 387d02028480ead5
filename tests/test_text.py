"""Tokenizer files, chat template, and text from tokens as they arrive."""

import json
import random
from datetime import datetime
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders
from tokenizers.models import BPE

from afd_ray.text import IncrementalDetokenizer, Tokenizer, TokenizerError
from afd_ray.text.chat_template import ChatTemplate
from tests.ingress_fake import byte_ids, write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    found = Tokenizer.from_directory(write_tokenizer(tmp_path))
    assert found is not None
    return found


def feed_all(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.feed(token_id) for token_id in token_ids), detokenizer.flush()]


def test_a_directory_without_tokenizer_gives_none(tmp_path: Path) -> None:
    assert Tokenizer.from_directory(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer.json", "{", "not a tokenizer"),
        ("tokenizer.json", "[]", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": {"a": 1}}', "special tokens or chat template cannot be read"),
        ("tokenizer_config.json", '{"chat_template": [1]}', "special tokens or chat template cannot be read"),
        ("chat_template.jinja", "{% if %}", "special tokens or chat template cannot be read"),
    ],
)
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, name: str, content: str, expected: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: {expected}")
    assert "\n" not in str(caught.value)


def test_text_round_trips(tokenizer: Tokenizer) -> None:
    text = "ab the caf\u00e9 \U0001f600\n"
    ids = tokenizer.encode(text)
    assert len(ids) < len(text.encode())  # the merges were used
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_bytes_but_no_text(tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.encode("</s>")
    assert tokenizer.token_bytes(end) == b"</s>"
    assert tokenizer.text_bytes(end) == b""


def test_ids_beyond_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(tokenizer.size + 5) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_bytes(2**40) == b""


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("\ud800")


def test_byte_fallback_tokens_are_bytes() -> None:
    backend = HuggingFaceTokenizer(BPE(vocab={"<0xC3>": 0, "<0xA9>": 1, "\u2581hi": 2}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    assert Tokenizer(backend).decode([2, 0, 1]) == " hi\u00e9"


def test_chat_is_rendered_with_trimmed_blocks(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    assert tokenizer.render_chat(messages) == "u:hi|a:yo|a:"
    assert tokenizer.render_chat(messages, add_generation_prompt=False) == "u:hi|a:yo|"


def test_a_template_refusal_is_one_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="unknown role robot") as caught:
        tokenizer.render_chat([{"role": "robot", "content": "x"}])
    assert "\n" not in str(caught.value)


def test_templates_see_special_tokens_time_and_json() -> None:
    source = (
        "{{ bos_token }}{{ strftime_now('%Y') }}{{ tools | tojson }}{% generation %}{{ messages[0].content }}{% endgeneration %}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"}, now=lambda: datetime(2031, 1, 1))
    assert template.render([{"role": "user", "content": "<b>"}], tools=[{"a": "<"}]) == '<s>2031[{"a": "<"}]<b>'


def test_templates_cannot_reach_python() -> None:
    template = ChatTemplate("{{ ''.__class__.__mro__ }}", {})
    with pytest.raises(ValueError, match="chat template"):
        template.render([])


def test_template_file_wins_and_named_templates_have_a_default(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    by_name = Tokenizer.from_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("file")
    by_file = Tokenizer.from_directory(tmp_path)
    assert by_name is not None
    assert by_file is not None
    assert (by_name.render_chat([]), by_file.render_chat([])) == ("yes", "file")


def test_no_template_is_said(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, chat_template=None))
    assert tokenizer is not None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render_chat([])


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    pieces = feed_all(IncrementalDetokenizer(tokenizer), byte_ids(tokenizer, "a\U0001f600b".encode()))
    assert pieces == ["a", "", "", "", "\U0001f600", "b", ""]


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_come_out_as_a_decoder_would_have_them(tokenizer: Tokenizer, seed: int) -> None:
    raw = random.Random(seed).randbytes(60)
    assert "".join(feed_all(IncrementalDetokenizer(tokenizer), byte_ids(tokenizer, raw))) == raw.decode(errors="replace")


def test_a_possible_stop_string_is_held_back(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, ["\n\nQ"])
    pieces = feed_all(detokenizer, byte_ids(tokenizer, b"a\n\nb\n\nQz"))
    assert pieces == ["a", "", "", "\n\nb", "", "", "", "", ""]
    assert detokenizer.stopped == "\n\nQ"


def test_what_was_held_comes_out_at_the_end(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, ["stop"])
    assert feed_all(detokenizer, byte_ids(tokenizer, b"a sto")) == ["a", " ", "", "", "", "sto"]
    assert detokenizer.stopped is None


def test_the_stop_string_complete_first_cuts(tokenizer: Tokenizer) -> None:
    """However the text was split into tokens: ' the' is one token here, and bytes there."""
    for token_ids in (tokenizer.encode("x then"), byte_ids(tokenizer, b"x then")):
        detokenizer = IncrementalDetokenizer(tokenizer, ["he", " th"])
        assert "".join(feed_all(detokenizer, token_ids)) == "x"
        assert detokenizer.stopped == " th"


def test_offsets_count_whole_characters(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer, ["zz"])
    offsets = []
    for token_id in byte_ids(tokenizer, "\u00e9zb".encode()):
        offsets.append(detokenizer.characters)
        detokenizer.feed(token_id)
    assert offsets == [0, 0, 1, 2]
