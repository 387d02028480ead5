"""What is said on a token stream: orders to an attention actor, answers from it, as msgpack frames."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

from afd_ray.request import KVTicket, Request, SamplingParams, TokenOutput

PROTOCOL_VERSION = 3


class Submit(NamedTuple):
    request: Request
    generated: tuple[int, ...] = ()
    """Tokens that it has from elsewhere: the actor goes on after them."""
    ticket: KVTicket | None = None
    """Where the keys and values of these are."""


class Abort(NamedTuple):
    request_id: str


class Refused(NamedTuple):
    """The engine can never run this request; `reason` is one line."""

    request_id: str
    reason: str


class Moved(NamedTuple):
    """The actor gives the request back: it has to go on elsewhere."""

    request_id: str
    failure: str = ""
    """One line, where the actor has failed; empty where it only hands its requests over."""
    ticket: KVTicket | None = None
    """For whoever goes on with it: where its keys and values are."""


Answer = TokenOutput | Refused | Moved

_TOKEN, _REFUSED, _MOVED = range(3)
_ANSWERS: tuple[type[Answer], ...] = (TokenOutput, Refused, Moved)


def encode_order(order: Submit | Abort) -> bytes:
    """One order; a frame is any number of them, joined. Raises OverflowError for integers beyond 64 bits."""
    return _pack(_order_fields(order))


def decode_orders(frame: bytes) -> list[Submit | Abort | Refused]:
    """Refused: a request that this side cannot accept, such as sampling parameters out of range."""
    unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=0)
    unpacker.feed(frame)
    return [_decode_order(raw) for raw in unpacker]


def encode_answers(answers: Sequence[Answer]) -> bytes:
    return _pack([_encode_answer(answer) for answer in answers])


def decode_answers(frame: bytes) -> list[Answer]:
    return [_decode_answer(raw) for raw in msgpack.unpackb(frame, use_list=False)]


def encode_hello() -> bytes:
    return _pack(PROTOCOL_VERSION)


def decode_hello(frame: bytes) -> object:
    return msgpack.unpackb(frame)


def _pack(value: Any) -> bytes:
    packed = msgpack.packb(value)
    assert isinstance(packed, bytes)
    return packed


def _order_fields(order: Submit | Abort) -> tuple[Any, ...]:
    if isinstance(order, Abort):
        return (order.request_id,)
    request = order.request
    params = {name: getattr(request.params, name) for name in SamplingParams.__dataclass_fields__}
    return (request.id, request.prompt_token_ids, params, order.generated, order.ticket)


def _decode_order(raw: tuple[Any, ...]) -> Submit | Abort | Refused:
    if len(raw) == 1:
        return Abort(raw[0])
    request_id, prompt, params, generated, ticket = raw
    try:
        return Submit(Request(request_id, prompt, SamplingParams(**params)), generated, _decode_ticket(ticket))
    except (TypeError, ValueError) as error:
        return Refused(request_id, str(error))


def _encode_answer(answer: Answer) -> tuple[Any, ...]:
    if isinstance(answer, Refused):
        return (_REFUSED, *answer)
    if isinstance(answer, Moved):
        return (_MOVED, *answer)
    value = (answer.token_id, answer.logprob, answer.top_logprobs, answer.finish_reason, answer.error, answer.epoch)
    return (_TOKEN, answer.request_id, *value)


def _decode_answer(raw: tuple[Any, ...]) -> Answer:
    kind, *fields = raw
    if kind == _MOVED:
        request_id, failure, ticket = fields
        return Moved(request_id, failure, _decode_ticket(ticket))
    answer: Answer = _ANSWERS[kind](*fields)
    return answer


def _decode_ticket(raw: tuple[Any, ...] | None) -> KVTicket | None:
    return None if raw is None else KVTicket(*raw)
