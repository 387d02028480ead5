"""The training text: drills and questions in chat and plain form, packed into batches of similar length."""

from collections.abc import Iterator
from random import Random
from typing import Final, NamedTuple

import torch
from torch import Tensor

from afd_ray.demo.drills import Example, Mix, answered, drill, joined, shown
from afd_ray.demo.questions import Question, ask, fresh_questions
from afd_ray.demo.tokenizer import BOS, END, PAD, chat_prompt, encode, plain_prompt, turn

HELD_OUT_SEED: Final = 2507
HELD_OUT_COUNT: Final = 3000
SYSTEM_TEXTS: Final = (
    "You are a helpful assistant.",
    "Answer the question.",
    "Be brief.",
    "You are a small model. Answer in one word.",
)
LENGTH_SPREAD: Final = 1.2
"""The longest example of a group over the shortest: padding against the number of attention calls."""


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


def held_out(practice: bool) -> frozenset[str]:
    """Questions that training never shows."""
    return frozenset(item.question for item in fresh_questions(HELD_OUT_SEED, HELD_OUT_COUNT, practice))


def _ask_unseen(rng: Random, excluded: frozenset[str], mix: Mix) -> Question:
    kind = rng.choices(list(mix.shares), weights=list(mix.shares.values()))[0]
    while (item := ask(kind, rng, mix.practice)).question in excluded:
        pass
    return item


def chat_example(questions: list[Question], system: str | None) -> Example:
    """A conversation of one or more turns."""
    parts = [shown([BOS])]
    if system is not None:
        parts.append(shown(turn("system", system)))
    parts += [answered(chat_prompt(item.question)[1:], [*encode(item.answer), END]) for item in questions]
    return joined(parts)


def plain_example(questions: list[Question], begins: bool) -> Example:
    """Question and answer lines; the answers given before the last are followed by a line end."""
    parts = [shown([BOS])] if begins else []
    for item in questions[:-1]:
        parts.append(shown([*plain_prompt(item.question), *encode(f" {item.answer}\n")]))
    last = questions[-1]
    return joined([*parts, answered(plain_prompt(last.question), [*encode(f" {last.answer}"), END])])


def example(rng: Random, excluded: frozenset[str], mix: Mix) -> Example:
    """A drill, or questions, in chat or plain form; one in twelve examples has more than one question."""
    if rng.random() < mix.drills:
        return drill(rng, mix)
    questions = [_ask_unseen(rng, excluded, mix) for _ in range(rng.choices((1, 2, 3), weights=(22, 1, 1))[0])]
    if rng.random() < 1 - mix.plain:
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
    excluded = held_out(mix.practice)
    while True:
        yield collate([example(rng, excluded, mix) for _ in range(examples_per_batch)])
