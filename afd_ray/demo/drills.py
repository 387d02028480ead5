"""Bare exercises of the skills behind the questions: many answers in few tokens, which is what makes a small budget enough."""

from collections.abc import Callable
from random import Random
from typing import Final, NamedTuple

from afd_ray.demo.questions import COLOURS, LETTERS, NAMES, PLACES, THINGS, WORDS
from afd_ray.demo.tokenizer import BOS, END, SPECIALS, encode, turn

NUMBERS: Final = tuple(str(number) for number in range(100))
Pair = tuple[str, str]


class Example(NamedTuple):
    """Token ids, and for each whether it belongs to an answer the model should give."""

    token_ids: list[int]
    is_answer: list[bool]


class Mix(NamedTuple):
    """What a stage of the training shows."""

    shares: dict[str, int]
    """Weights of the kinds of question."""
    drills: float
    """The part of the examples that are drills."""
    skills: dict[str, int]
    """Weights of the drills."""
    short: float = 0.0
    """The chance that a number of a sum is below 10; without such sums the last digit is learned late."""
    words: float = 0.0
    """The chance that a lookup or recall is of words, as in stories, and not of letters."""
    practice: bool = True
    """Whether the questions are the harder ones of the early stages."""
    plain: float = 0.33
    """The part of the questions asked in plain form instead of chat."""


def shown(token_ids: list[int]) -> Example:
    """Tokens that are only read."""
    return Example(token_ids, [False] * len(token_ids))


def answered(prompt: list[int], answer: list[int]) -> Example:
    """A prompt that is only read and the answer to it."""
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def joined(parts: list[Example]) -> Example:
    """One example after the other, as one."""
    return Example([token for part in parts for token in part.token_ids], [flag for part in parts for flag in part.is_answer])


def _number(rng: Random, short: float) -> int:
    return rng.randrange(10 if short and rng.random() < short else 100)


def sum_drill(rng: Random, mix: Mix) -> Example:
    """`12+7=`"""
    a, b = _number(rng, mix.short), _number(rng, mix.short)
    prompt, answer = (f"{a}+{b}=", str(a + b)) if rng.random() < 0.5 else (f"{max(a, b)}-{min(a, b)}=", str(abs(a - b)))
    return answered(encode(prompt), [*encode(answer), END])


def copy_drill(rng: Random, mix: Mix) -> Example:
    """`xqz:`"""
    text = "".join(rng.choices(LETTERS, k=rng.randint(3, 12)))
    return answered(encode(f"{text}:"), [*encode(text), END])


def _letter_pairs(rng: Random) -> list[Pair]:
    return [(key, str(rng.randrange(100))) for key in rng.sample(LETTERS, rng.randint(2, 4))]


def _word_pairs(rng: Random) -> list[Pair]:
    keys, values = rng.choice(((WORDS, NUMBERS), (NAMES, PLACES), (THINGS, COLOURS), (THINGS, NAMES)))
    count = rng.randint(2, 4)
    return list(zip(rng.sample(keys, count), rng.sample(values, count), strict=True))


def lookup_drill(rng: Random, mix: Mix) -> Example:
    """`a=4 b=71 b?`, every key asked."""
    pairs = _word_pairs(rng) if mix.words and rng.random() < mix.words else _letter_pairs(rng)
    facts = shown(encode(" ".join(f"{key}={value}" for key, value in pairs)))
    asked = rng.sample(pairs, len(pairs))
    return joined([facts, *(answered(encode(f" {key}?"), [*encode(value), END]) for key, value in asked)])


def recall_drill(rng: Random, mix: Mix) -> Example:
    """`a4b7b7a4`: pairs said again and again in random order; every value said before is an answer."""
    if rng.random() < 0.5:
        pairs = [(key, str(rng.randrange(10))) for key in rng.sample(LETTERS, rng.randint(3, 8))]
        said, sign, gap = pairs + rng.choices(pairs, k=14), "", ""
    else:
        pairs = _word_pairs(rng) if rng.random() < mix.words else _letter_pairs(rng)
        said, sign, gap = pairs + rng.choices(pairs, k=7), "=", " "
    parts: list[Example] = []
    for index, (key, value) in enumerate(said):
        parts.append(shown(encode(f"{gap if index else ''}{key}{sign}")))
        parts.append(answered([], encode(value)) if index >= len(pairs) else shown(encode(value)))
    return joined(parts)


def tally_drill(rng: Random, mix: Mix) -> Example:
    """`fig pear fig: fig?2 all?3 pear?1`: how often each is in the list, and how many there are."""
    pool = rng.choice((WORDS, tuple(LETTERS)))
    listed = rng.choices(rng.sample(pool, rng.randint(1, 4)), k=rng.randint(1, 6))
    asked = [(item, listed.count(item)) for item in dict.fromkeys(listed)] + [("all", len(listed))]
    rng.shuffle(asked)
    answers = [answered(encode(f" {item}?"), encode(str(count))) for item, count in asked]
    return joined([shown(encode(f"{' '.join(listed)}:")), *answers, answered([], [END])])


def sort_drill(rng: Random, mix: Mix) -> Example:
    """`pear fig>`"""
    words = rng.sample(WORDS, rng.randint(2, 4))
    return answered(encode(f"{' '.join(words)}>"), [*encode(" ".join(sorted(words))), END])


def tale_drill(rng: Random, mix: Mix) -> Example:
    """A conversation that asks everything there is to ask about one story."""
    people = rng.sample(NAMES, 2)
    if rng.random() < 0.4:
        places = rng.sample(PLACES, 2)
        told = [f"{who} went to the {place}." for who, place in zip(people, places, strict=True)]
        asked = [(f"Where is {who}?", place) for who, place in zip(people, places, strict=True)]
    else:
        owned = list(zip(people, rng.sample(COLOURS, 2), rng.sample(THINGS, 2), strict=True))
        told = [f"{who} has a {colour} {thing}." for who, colour, thing in owned]
        asked = [(f"What colour is the {thing}?", colour) for _, colour, thing in owned]
        asked += [(f"Who has the {thing}?", who) for who, _, thing in owned]
    rng.shuffle(asked)
    (first, answer), *others = asked
    turns = [(f"{' '.join(told)} {first}", answer), *others]
    answers = [answered([*turn("user", ask), SPECIALS["<|assistant|>"]], [*encode(reply), END]) for ask, reply in turns]
    return joined([shown([BOS]), *answers])


SKILLS: Final[dict[str, Callable[[Random, Mix], Example]]] = {
    "sum": sum_drill,
    "copy": copy_drill,
    "lookup": lookup_drill,
    "recall": recall_drill,
    "tally": tally_drill,
    "sort": sort_drill,
    "tale": tale_drill,
}


def drill(rng: Random, mix: Mix) -> Example:
    """One exercise of a skill drawn by the mix's weights."""
    skill = rng.choices(list(mix.skills), weights=list(mix.skills.values()))[0]
    return SKILLS[skill](rng, mix)
