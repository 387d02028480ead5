"""Tokens from an attention actor to an ingress replica: one multiplexed gRPC stream each, a batch a step. What both ends of it know."""

import asyncio
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from actors.token_frames import Answer
from afd_ray.request import TokenOutput

T = TypeVar("T")

SERVICE = "afd.TokenStream"
METHOD = "Attach"
SECRET_KEY = "afd-secret-bin"
INGRESS_KEY = "afd-ingress-id"

# A ping every 30 s on an otherwise silent stream: a peer whose host vanished is noticed, and an idle pair costs nothing measurable.
CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
)


class Outbox(Generic[T]):
    """What waits to be written on one stream; the writer takes all of it at once, so a slow peer gets larger batches."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._filled = asyncio.Event()

    def put(self, items: Sequence[T]) -> None:
        self._items.extend(items)
        self._filled.set()

    async def take(self) -> list[T]:
        await self._filled.wait()
        items, self._items = self._items, []
        self._filled.clear()
        return items


class Lost(NamedTuple):
    """The stream broke under the request; what the actor has done for it since the last token is not known."""

    request_id: str
    reason: str


def is_last(answer: Answer | Lost) -> bool:
    """Whether nothing more is said of the request after this."""
    return not isinstance(answer, TokenOutput) or answer.finish_reason is not None
