"""The questions: the same for a seed, right, and never those of the training stream."""

import json
import re
from random import Random

import pytest

from afd_ray.demo.corpus import HELD_OUT_COUNT, HELD_OUT_SEED, example, held_out
from afd_ray.demo.drills import SKILLS, Mix, drill
from afd_ray.demo.questions import KINDS, Question, ask, fresh_questions, main
from afd_ray.demo.tokenizer import decode
from afd_ray.demo.train import STAGES

SEEDS = (0, 1, -7, 2**70)
ALL_SKILLS = next(stage.mix for stage in STAGES if set(stage.mix.skills) == set(SKILLS))


def numbers(text: str) -> list[int]:
    return [int(item) for item in re.findall(r"\d+", text)]


def after_colon(text: str) -> list[str]:
    return text.split(": ", 1)[1].split(" ")


def solve_arithmetic(text: str) -> str:
    a, b = numbers(text)
    return str(a - b if "minus" in text or " - " in text else a + b)


def solve_counting(text: str) -> str:
    if text.startswith("Count the words"):
        return str(len(after_colon(text)))
    return str(after_colon(text).count(text.split()[1]))


def solve_lookup(text: str) -> str:
    asked = re.search(r"what is (\w+)\?", text)
    assert asked
    return dict(re.findall(r"(\w+)=(\d+)", text))[asked[1]]


def solve_story(text: str) -> str:
    if "How many" in text:
        had, change = numbers(text)
        return str(had + change if "gives" in text else had - change)
    *facts, question = re.split(r"(?<=\.) ", text)
    told = [fact.rstrip(".").split() for fact in facts]
    word = question.rstrip("?").split()[-1]
    if question.startswith("Where"):
        return next(fact[-1] for fact in told if fact[0] == word)
    owner, _, _, colour, _ = next(fact for fact in told if fact[-1] == word)
    return colour if question.startswith("What colour") else owner


SOLVERS = {
    "arithmetic": solve_arithmetic,
    "counting": solve_counting,
    "sorting": lambda text: " ".join(sorted(after_colon(text))),
    "copying": lambda text: text.removeprefix("Repeat this: "),
    "lookup": solve_lookup,
    "story": solve_story,
}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_always_gives_the_same_questions(seed: int) -> None:
    assert fresh_questions(seed, 50) == fresh_questions(seed, 50)
    assert fresh_questions(seed, 50) != fresh_questions(seed + 1, 50)


@pytest.mark.parametrize("practice", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_when_worked_out_independently(kind: str, practice: bool) -> None:
    rng = Random(kind)
    for item in (ask(kind, rng, practice) for _ in range(300)):
        assert item == Question(item.question, SOLVERS[kind](item.question), kind)


def test_kinds_come_in_equal_parts() -> None:
    kinds = [item.kind for item in fresh_questions(3, 500)]
    assert {kinds.count(kind) for kind in KINDS} <= {83, 84}


def test_arithmetic_stays_within_99_and_above_zero() -> None:
    rng = Random(0)
    for item in (ask("arithmetic", rng) for _ in range(500)):
        assert max(numbers(item.question)) <= 99
        assert int(item.answer) >= 0


@pytest.mark.parametrize("mix", [STAGES[0].mix, STAGES[-1].mix])
def test_training_shows_no_held_out_question(mix: Mix) -> None:
    excluded = held_out(mix.practice)
    rng = Random(5)
    shown = {line for _ in range(2000) for line in questions_of(decode(example(rng, excluded, mix).token_ids))}
    assert shown
    assert not shown & {item.question for item in fresh_questions(HELD_OUT_SEED, HELD_OUT_COUNT, mix.practice)}


def questions_of(text: str) -> list[str]:
    return [line.removeprefix("Q: ") for line in text.splitlines() if line.startswith("Q: ")]


def test_the_command_prints_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seed", "4", "--count", "7"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Question(**line) for line in lines] == fresh_questions(4, 7)


def test_the_command_refuses_a_negative_count(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--count", "-1"])
    assert "--count must be 0 or more, got -1" in capsys.readouterr().err


def test_drills_are_right() -> None:
    rng = Random(6)
    for _ in range(300):
        text = decode(drill(rng, ALL_SKILLS).token_ids)
        if found := re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", text):
            a, sign, b, result = found.groups()
            assert int(result) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        elif found := re.fullmatch(r"(\w+):(\w+)", text):
            assert found[1] == found[2]
        elif found := re.fullmatch(r"([\w ]+):((?: \w+\?\d+)+)", text):
            listed = found[1].split(" ")
            for item, count in re.findall(r"(\w+)\?(\d+)", found[2]):
                assert int(count) == (len(listed) if item == "all" else listed.count(item))
        elif found := re.fullmatch(r"([\w ]+)>([\w ]+)", text):
            assert found[2].split(" ") == sorted(found[1].split(" "))
        elif "." in text:
            told = text[: text.rindex(".") + 1]
            for ask, reply in re.findall(r"(W[a-z]+ [\w ]+\?)([A-Za-z]+?)(?=W[a-z]+ |$)", text[len(told) + 1 :]):
                assert reply == solve_story(f"{told} {ask}")
        else:
            said = re.findall(r"(\w+)[=?](\w+)", text) or re.findall(r"([a-z])(\d)", text)
            assert len(set(said)) == len({key for key, _ in said}) > 1
