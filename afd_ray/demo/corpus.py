"""The training text: drills and questions in chat and plain form, packed into batches of similar length."""

from collections.abc import Iterator
from random import Random
from typing import Final, NamedTuple

import torch
from torch import Tensor

from afd_ray.demo.questions import COLOURS, LETTERS, NAMES, PLACES, THINGS, WORDS, Question, ask, fresh_questions
from afd_ray.demo.tokenizer import BOS, END, PAD, chat_prompt, encode, plain_prompt, turn

HELD_OUT_SEED: Final = 2507
HELD_OUT_COUNT: Final = 3000
NUMBERS: Final = tuple(str(number) for number in range(100))
SYSTEM_TEXTS: Final = (
    "You are a helpful assistant.",
    "Answer the question.",
    "Be brief.",
    "You are a small model. Answer in one word.",
)
LENGTH_SPREAD: Final = 1.2
"""The longest example of a group over the shortest: padding against the number of attention calls."""


class Mix(NamedTuple):
    """What a stage of the training shows."""

    shares: dict[str, int]
    """Weights of the kinds of question."""
    drills: float
    """The part of the examples that are drills; the next five are weights within it."""
    sums: int
    copies: int
    lookups: int
    recalls: int
    tallies: int
    short: float
    """The chance that a number of a sum is below 10; without such sums the last digit is learned late."""
    words: float
    """The chance that a lookup or recall is of words, as in stories, and not of letters."""


class Example(NamedTuple):
    """Token ids, and for each whether it belongs to an answer the model should give."""

    token_ids: list[int]
    is_answer: list[bool]


class Group(NamedTuple):
    """Rows of a batch that attend together: `examples` padded to `length`, example after example."""

    examples: int
    length: int


class Batch(NamedTuple):
    """Examples sorted by length, flattened to N rows, as groups of similar length."""

    token_ids: Tensor  # [N] int64
    positions: Tensor  # [N] int64
    targets: Tensor  # [N] int64, the next token; -100 where there is none
    is_answer: Tensor  # [N] bool, whether the target belongs to an answer
    groups: list[Group]


def held_out() -> frozenset[str]:
    """Questions that training never shows."""
    return frozenset(item.question for item in fresh_questions(HELD_OUT_SEED, HELD_OUT_COUNT))


def _ask_unseen(rng: Random, excluded: frozenset[str], shares: dict[str, int]) -> Question:
    kind = rng.choices(list(shares), weights=list(shares.values()))[0]
    while (item := ask(kind, rng)).question in excluded:
        pass
    return item


def _answered(prompt: list[int], answer: list[int]) -> Example:
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def _joined(parts: list[Example]) -> Example:
    return Example([token for part in parts for token in part.token_ids], [flag for part in parts for flag in part.is_answer])


def chat_example(questions: list[Question], system: str | None) -> Example:
    """A conversation of one or more turns."""
    parts = [Example([BOS], [False])]
    if system is not None:
        message = turn("system", system)
        parts.append(Example(message, [False] * len(message)))
    parts += [_answered(chat_prompt(item.question)[1:], [*encode(item.answer), END]) for item in questions]
    return _joined(parts)


def plain_example(questions: list[Question], begins: bool) -> Example:
    """Question and answer lines; the answers given before the last are followed by a line end."""
    parts = [Example([BOS], [False])] if begins else []
    for item in questions[:-1]:
        line = [*plain_prompt(item.question), *encode(f" {item.answer}\n")]
        parts.append(Example(line, [False] * len(line)))
    last = questions[-1]
    return _joined([*parts, _answered(plain_prompt(last.question), [*encode(f" {last.answer}"), END])])


def _number(rng: Random, short: float) -> int:
    return rng.randrange(10 if short and rng.random() < short else 100)


def _letter_pairs(rng: Random) -> list[tuple[str, str]]:
    return [(key, str(rng.randrange(100))) for key in rng.sample(LETTERS, rng.randint(2, 4))]


def _word_pairs(rng: Random) -> list[tuple[str, str]]:
    keys, values = rng.choice(((WORDS, NUMBERS), (NAMES, PLACES), (THINGS, COLOURS), (THINGS, NAMES)))
    count = rng.randint(2, 4)
    return list(zip(rng.sample(keys, count), rng.sample(values, count), strict=True))


def recall(rng: Random, mix: Mix) -> Example:
    """Pairs said again and again in random order; every value said before is an answer, so it teaches lookup densely."""
    if rng.random() < 0.5:
        pairs = [(key, str(rng.randrange(10))) for key in rng.sample(LETTERS, rng.randint(3, 8))]
        said, sign, gap = pairs + rng.choices(pairs, k=14), "", ""
    else:
        pairs = _word_pairs(rng) if rng.random() < mix.words else _letter_pairs(rng)
        said, sign, gap = pairs + rng.choices(pairs, k=7), "=", " "
    parts: list[Example] = []
    for index, (key, value) in enumerate(said):
        before = encode(f"{gap if index else ''}{key}{sign}")
        parts.append(Example(before, [False] * len(before)))
        parts.append(Example(encode(value), [index >= len(pairs)] * len(value)))
    return _joined(parts)


def tally(rng: Random) -> Example:
    """A list of words or letters, how often each is in it, and how many there are."""
    pool = rng.choice((WORDS, tuple(LETTERS)))
    listed = rng.choices(rng.sample(pool, rng.randint(1, 4)), k=rng.randint(1, 6))
    asked = [(item, listed.count(item)) for item in dict.fromkeys(listed)] + [("all", len(listed))]
    rng.shuffle(asked)
    text = encode(f"{' '.join(listed)}:")
    parts = [_answered(encode(f" {item}?"), encode(str(count))) for item, count in asked]
    return _joined([Example(text, [False] * len(text)), *parts, Example([END], [True])])


def drill(rng: Random, mix: Mix) -> Example:
    """A bare sum, copy, lookup, recall or tally: the skill of a question in a third of its tokens."""
    skill = rng.choices(
        ("sum", "copy", "lookup", "recall", "tally"), weights=(mix.sums, mix.copies, mix.lookups, mix.recalls, mix.tallies)
    )[0]
    if skill == "sum":
        a, b = _number(rng, mix.short), _number(rng, mix.short)
        prompt, answer = (f"{a}+{b}=", str(a + b)) if rng.random() < 0.5 else (f"{max(a, b)}-{min(a, b)}=", str(abs(a - b)))
        return _answered(encode(prompt), [*encode(answer), END])
    if skill == "copy":
        text = "".join(rng.choices(LETTERS, k=rng.randint(3, 12)))
        return _answered(encode(f"{text}:"), [*encode(text), END])
    if skill == "recall":
        return recall(rng, mix)
    if skill == "tally":
        return tally(rng)
    pairs = _word_pairs(rng) if mix.words and rng.random() < mix.words else _letter_pairs(rng)
    parts = [Example(listed := encode(" ".join(f"{key}={value}" for key, value in pairs)), [False] * len(listed))]
    asked = rng.sample(pairs, len(pairs))
    return _joined(parts + [_answered(encode(f" {key}?"), [*encode(value), END]) for key, value in asked])


def example(rng: Random, excluded: frozenset[str], mix: Mix) -> Example:
    """A drill, or questions: two in three of those are chats, one in twelve has more than one question."""
    if rng.random() < mix.drills:
        return drill(rng, mix)
    questions = [_ask_unseen(rng, excluded, mix.shares) for _ in range(rng.choices((1, 2, 3), weights=(22, 1, 1))[0])]
    if rng.random() < 0.67:
        return chat_example(questions, rng.choice(SYSTEM_TEXTS) if rng.random() < 0.08 else None)
    return plain_example(questions, rng.random() < 0.4)


def of_similar_length(ordered: list[Example]) -> Iterator[list[Example]]:
    """Cut a list sorted by length where the spread grows too wide."""
    members: list[Example] = []
    for item in ordered:
        if members and len(item.token_ids) > LENGTH_SPREAD * len(members[0].token_ids):
            yield members
            members = []
        members.append(item)
    if members:
        yield members


def collate(examples: list[Example]) -> Batch:
    """Sort, pad within groups and flatten."""
    ordered = sorted(examples, key=lambda item: len(item.token_ids))
    tokens: list[int] = []
    targets: list[int] = []
    answers: list[bool] = []
    positions: list[int] = []
    groups: list[Group] = []
    for members in of_similar_length(ordered):
        length = len(members[-1].token_ids) - 1
        groups.append(Group(len(members), length))
        for member in members:
            padding = length + 1 - len(member.token_ids)
            tokens += member.token_ids[:-1] + [PAD] * padding
            targets += member.token_ids[1:] + [-100] * padding
            answers += member.is_answer[1:] + [False] * padding
            positions += range(length)
    return Batch(torch.tensor(tokens), torch.tensor(positions), torch.tensor(targets), torch.tensor(answers), groups)


def batches(stream: str, mix: Mix, examples_per_batch: int) -> Iterator[Batch]:
    """Endless training batches of a named stream; it shares nothing with `fresh_questions` of any seed."""
    rng = Random(f"training {stream}")
    excluded = held_out()
    while True:
        yield collate([example(rng, excluded, mix) for _ in range(examples_per_batch)])
