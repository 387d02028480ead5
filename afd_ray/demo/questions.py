"""The questions the demo model answers: every template, word and number range, in this one file."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Final

# fmt: off
WORDS: Final = (
    "apple", "bean", "cat", "cup", "dog", "egg", "fig", "fish", "goat", "hat", "ink", "jam", "kite", "lamp", "leaf", "map",
    "milk", "nut", "owl", "pear", "pen", "pig", "plum", "quilt", "rice", "ring", "sock", "sun", "tea", "tree", "urn", "van",
    "wolf", "yak", "zebra",
)
# fmt: on
NAMES: Final = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Iris", "Jon")
PLACES: Final = ("park", "shop", "lake", "barn", "school", "beach", "mill", "farm")
COLOURS: Final = ("red", "blue", "green", "black", "white", "pink")
THINGS: Final = ("cup", "hat", "kite", "lamp", "pen", "sock", "van")
LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its only right answer."""

    question: str
    answer: str
    kind: str


def arithmetic(rng: Random) -> tuple[str, str]:
    """Sums and non-negative differences of numbers from 0 to 99."""
    a, b = rng.randrange(100), rng.randrange(100)
    if rng.random() < 0.5:
        return rng.choice((f"What is {a} plus {b}?", f"What is {a} + {b}?")), str(a + b)
    a, b = max(a, b), min(a, b)
    return rng.choice((f"What is {a} minus {b}?", f"What is {a} - {b}?")), str(a - b)


def counting(rng: Random) -> tuple[str, str]:
    """How many words there are, 1 to 5."""
    words = rng.choices(WORDS, k=rng.randint(1, 5))
    return f"Count the words: {' '.join(words)}", str(len(words))


def counting_practice(rng: Random) -> tuple[str, str]:
    """How many words there are (1 to 6), or how often one of them appears (1 to 4)."""
    if rng.random() < 0.5:
        words = rng.choices(WORDS, k=rng.randint(1, 6))
        return f"Count the words: {' '.join(words)}", str(len(words))
    word, *others = rng.sample(WORDS, 4)
    times = rng.randint(1, 4)
    words = [word] * times + rng.choices(others, k=rng.randint(1, 6 - times))
    rng.shuffle(words)
    return f"Count {word} in: {' '.join(words)}", str(times)


def sorting(rng: Random) -> tuple[str, str]:
    """Three or four different words into alphabetical order."""
    words = rng.sample(WORDS, rng.randint(3, 4))
    return f"Sort these words: {' '.join(words)}", " ".join(sorted(words))


def copying(rng: Random) -> tuple[str, str]:
    """One to three words, or three to five random letters, repeated exactly."""
    return _copying(rng, letters=5)


def copying_practice(rng: Random) -> tuple[str, str]:
    """One to three words, or three to six random letters."""
    return _copying(rng, letters=6)


def _copying(rng: Random, letters: int) -> tuple[str, str]:
    if rng.random() < 0.5:
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 3)))
    else:
        text = "".join(rng.choices(LETTERS, k=rng.randint(3, letters)))
    return f"Repeat this: {text}", text


def lookup(rng: Random) -> tuple[str, str]:
    """The number that belongs to one of two or three keys."""
    return _lookup(rng, keys=3)


def lookup_practice(rng: Random) -> tuple[str, str]:
    """The number that belongs to one of two to four keys."""
    return _lookup(rng, keys=4)


def _lookup(rng: Random, keys: int) -> tuple[str, str]:
    names = rng.sample(WORDS, rng.randint(2, keys))
    values = [str(rng.randrange(100)) for _ in names]
    chosen = rng.randrange(len(names))
    pairs = " ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
    return f"Given {pairs}, what is {names[chosen]}?", values[chosen]


def story(rng: Random) -> tuple[str, str]:
    """Two sentences about somebody's things, or one about a place, and a question about them."""
    return rng.choice((_story_of_gifts, _story_of_losses, _story_of_a_place))(rng)


def story_practice(rng: Random) -> tuple[str, str]:
    """As `story`, and stories of two people at once."""
    return rng.choice((_story_of_gifts, _story_of_losses, _story_of_places, _story_of_colours))(rng)


def _story_of_a_place(rng: Random) -> tuple[str, str]:
    who, place = rng.choice(NAMES), rng.choice(PLACES)
    return f"{who} went to the {place}. Where is {who}?", place


def _story_of_gifts(rng: Random) -> tuple[str, str]:
    (who, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    had, more = rng.randint(2, 9), rng.randint(2, 9)
    return (f"{who} has {had} {thing}s. {other} gives {who} {more}. How many {thing}s has {who}?", str(had + more))


def _story_of_losses(rng: Random) -> tuple[str, str]:
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    left, lost = rng.randint(2, 9), rng.randint(2, 9)
    return (f"{who} has {left + lost} {thing}s. {who} loses {lost}. How many {thing}s has {who}?", str(left))


def _story_of_places(rng: Random) -> tuple[str, str]:
    people, places = rng.sample(NAMES, 2), rng.sample(PLACES, 2)
    asked = rng.randrange(2)
    told = " ".join(f"{who} went to the {place}." for who, place in zip(people, places, strict=True))
    return f"{told} Where is {people[asked]}?", places[asked]


def _story_of_colours(rng: Random) -> tuple[str, str]:
    people, colours, things = (rng.sample(NAMES, 2), rng.sample(COLOURS, 2), rng.sample(THINGS, 2))
    asked = rng.randrange(2)
    told = " ".join(f"{people[i]} has a {colours[i]} {things[i]}." for i in range(2))
    if rng.random() < 0.5:
        return f"{told} What colour is the {things[asked]}?", colours[asked]
    return f"{told} Who has the {things[asked]}?", people[asked]


KINDS: Final[dict[str, Callable[[Random], tuple[str, str]]]] = {
    "arithmetic": arithmetic,
    "counting": counting,
    "sorting": sorting,
    "copying": copying,
    "lookup": lookup,
    "story": story,
}


PRACTICE: Final[dict[str, Callable[[Random], tuple[str, str]]]] = {
    **KINDS,
    "counting": counting_practice,
    "copying": copying_practice,
    "lookup": lookup_practice,
    "story": story_practice,
}
"""What the early stages of training ask: harder than what anybody else is asked."""


def ask(kind: str, rng: Random, practice: bool = False) -> Question:
    """A question of one kind."""
    question, answer = (PRACTICE if practice else KINDS)[kind](rng)
    return Question(question, answer, kind)


def fresh_questions(seed: int, count: int, practice: bool = False) -> list[Question]:
    """`count` questions, the kinds in equal parts and in random order; the same for the same arguments, any integer seed."""
    rng = Random(f"questions {seed}")
    kinds = (list(KINDS) * (count // len(KINDS) + 1))[:count]
    rng.shuffle(kinds)
    return [ask(kind, rng, practice) for kind in kinds]


def json_lines(questions: Sequence[Question]) -> str:
    """One JSON object a line: question, answer, kind."""
    return "".join(json.dumps(asdict(question)) + "\n" for question in questions)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print fresh questions as JSON lines."""
    parser = argparse.ArgumentParser(prog="afd-ray demo questions", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    options = parser.parse_args(arguments)
    if options.count < 0:
        parser.error(f"--count must be 0 or more, got {options.count}")
    print(json_lines(fresh_questions(options.seed, options.count)), end="")


if __name__ == "__main__":
    main()
