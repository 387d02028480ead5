"""`afd-ray demo`: questions that the bundled model should answer."""

import argparse
import json
from typing import Any

from actors.commands.arguments import integer


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("demo", help="the bundled model's task")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    questions = actions.add_parser("questions", help="fresh questions with their answers, a JSON object a line")
    questions.add_argument("--seed", type=integer(0), default=0, metavar="N", help="another seed, other questions (default 0)")
    questions.add_argument("--count", type=integer(1), default=10, metavar="K", help="how many (default 10)")
    questions.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from afd_ray.demo.questions import fresh_questions

    for item in fresh_questions(args.seed, args.count):
        print(json.dumps({"question": item.question, "answer": item.answer, "kind": item.kind}, ensure_ascii=False))
    return 0
