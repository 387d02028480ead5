"""How many fresh questions a model answers right, by kind: `python -m afd_ray.demo.evaluate DIR --seed N --count K`."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from afd_ray.demo.questions import Question, fresh_questions
from afd_ray.demo.tokenizer import chat_prompt, decode, plain_prompt
from afd_ray.demo.weights import load
from afd_ray.models.step3 import Step3Model

MAX_ANSWER_TOKENS = 64


class Reply(NamedTuple):
    """What the model said to a question."""

    question: Question
    text: str

    @property
    def right(self) -> bool:
        return self.text.strip() == self.question.answer


def answer(model: Step3Model, question: str, plain: bool = False) -> str:
    """The greedy answer, in chat or plain form."""
    prompt = plain_prompt(question) if plain else chat_prompt(question)
    return decode(model.generate_greedy(prompt, MAX_ANSWER_TOKENS, model.config.eos_token_ids))


def accuracy(replies: Iterable[Reply]) -> dict[str, float]:
    """The share of right answers of each kind, and `overall`."""
    by_kind: dict[str, list[bool]] = {}
    for reply in replies:
        by_kind.setdefault(reply.question.kind, []).append(reply.right)
    everything = [right for each in by_kind.values() for right in each]
    shares = {kind: sum(each) / len(each) for kind, each in sorted(by_kind.items())}
    return shares | {"overall": sum(everything) / max(1, len(everything))}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Accuracy of a demo model by kind of question.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--plain", action="store_true", help="ask in plain form instead of chat")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wrong", action="store_true", help="also print the wrong answers, to stderr")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.directory)
    replies = [Reply(item, answer(model, item.question, options.plain)) for item in fresh_questions(options.seed, options.count)]
    for reply in replies if options.wrong else []:
        if not reply.right:
            print(f"{reply.question.question!r}: {reply.text!r}, not {reply.question.answer!r}", file=sys.stderr)
    shares = accuracy(replies)
    print(json.dumps(shares) if options.json else "\n".join(f"{kind:12}{share:8.1%}" for kind, share in shares.items()))


if __name__ == "__main__":
    main()
