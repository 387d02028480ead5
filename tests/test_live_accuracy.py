"""The demo model answers right through HTTP, 32 questions at a time."""

import asyncio

import pytest

from afd_ray.demo.evaluate import accuracy
from afd_ray.demo.questions import fresh_questions
from benchmarks.accuracy import ask_all, too_low
from tests.live_server import LiveServer

pytestmark = pytest.mark.ray

SEED = 7_310_591
"""Of no training and no other test."""


@pytest.mark.parametrize("count", [100, pytest.param(500, marks=pytest.mark.full)])
def test_fresh_questions_are_answered_right(live: LiveServer, count: int) -> None:
    replies = asyncio.run(ask_all(live.url, fresh_questions(SEED + count, count)))
    wrong = [(reply.question.question, reply.text, reply.question.answer) for reply in replies if not reply.right]
    assert too_low(accuracy(replies)) == {}, wrong
