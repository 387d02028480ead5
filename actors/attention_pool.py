"""The attention actors as one ingress sees them: which takes a request, and which goes on with it when that one cannot."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Coroutine, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

from actors.attention_link import AttentionLink, Connect
from actors.course import Course
from actors.http.backend import Overloaded, Unavailable
from actors.queue_pace import QueuePace
from actors.token_client import TokenStreamClient
from afd_ray.membership.attempts import Succession
from afd_ray.request import Request, TokenOutput

PATIENCE_S = 60.0


class AttentionPool:
    """Routes each request to the actor with the least outstanding work, and refuses requests beyond `max_queued`.

    A request is queued until its first token. When its actor gives it back, or the stream to it breaks, it goes on with another one after the
    tokens that it has; for want of another it waits, `patience_s` at most from one token to the next. One event loop only.
    """

    def __init__(
        self,
        connect: Connect,
        *,
        max_queued: int,
        patience_s: float = PATIENCE_S,
        on_moved: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`on_moved` is called whenever a request goes on with another actor."""
        self.succession = Succession()
        self._connect, self._max_queued, self._patience_s = connect, max_queued, patience_s
        self._on_moved, self._clock = on_moved, clock
        self._links: dict[str, AttentionLink] = {}
        self._leaving: set[AttentionLink] = set()
        self._goodbyes: set[asyncio.Task[None]] = set()
        self._courses: set[Course] = set()
        self._queued = 0
        self._pace = QueuePace()
        self._views = 0
        self._news = asyncio.Event()
        self._closed: str | None = None

    @property
    def live(self) -> int:
        """Attention actors that can take a request."""
        return sum(link.stream is not None for link in self._links.values())

    @property
    def queued(self) -> int:
        return self._queued

    @property
    def under_way(self) -> int:
        """Requests that are not over."""
        return len(self._courses)

    def follow(self, addresses: Mapping[str, str], lost: Collection[str] = ()) -> None:
        """Connects to what is new among the actors (id to address), and lets go of the others.

        An actor let go of takes no new request, and its stream closes when its last one is over. The stream to a `lost` one closes at once,
        and so does the one to an earlier actor of the same id: nothing that it still says reaches a client.
        """
        self._closed = None
        self._views += 1
        for name, link in list(self._links.items()):
            if addresses.get(name) != link.address:
                del self._links[name]
                self._leaving.add(link)
                self._part(link, link.leave())
        for link in self._leaving:
            if link.name in lost or addresses.get(link.name, link.address) != link.address:
                self._part(link, link.close())
        for name, address in addresses.items():
            if name not in self._links:
                self._links[name] = AttentionLink(name, address, self._connect, self._announce)
        self._announce()

    async def settle(self) -> list[str]:
        """Waits until each actor is connected or could not be reached; tells, a line each, which could not."""
        links = list(self._links.values())
        failures = await asyncio.gather(*(link.tried() for link in links))
        return [f"{link.name}: {failure}" for link, failure in zip(links, failures, strict=True) if failure is not None]

    def end(self, reason: str) -> None:
        """No actor takes or goes on with a request any more, until `follow`: such a request is Unavailable, for this one-line reason."""
        self._closed = reason
        self._announce()

    def stop_all(self, reason: str) -> None:
        """Ends every request under way, Unavailable, for this one-line reason."""
        for course in self._courses:
            course.stop(reason)
        self._announce()

    async def close(self) -> None:
        self.end("the ingress is closing")
        self.stop_all("the ingress is closing")
        links, self._links = [*self._links.values(), *self._leaving], {}
        await asyncio.gather(*(link.close() for link in links))
        await asyncio.gather(*self._goodbyes)

    async def generate(self, request: Request) -> AsyncGenerator[TokenOutput, None]:
        """Every token once, whatever becomes of the actors; closing this early aborts the request.

        Overloaded when the queue is full, Unavailable when no actor is connected or none came to go on with, ValueError when the engine
        refuses the request.
        """
        stream = self._admit()
        course = Course(request)
        with self._under_way(course):
            while True:
                async with aclosing(course.attempt(stream)) as outputs:
                    async for output in outputs:
                        if course.queued:
                            self._leave_queue(course)
                            self._pace.left(self._clock())
                        if output.token_id is not None:
                            self.succession.note(output.epoch)
                        yield output
                if course.over:
                    return
                if course.ended_by is not None:
                    break
                course.avoided[stream] = self._views
                stream = await self._elsewhere(course)
            yield TokenOutput(request.id, None, finish_reason=course.ended_by)

    @contextmanager
    def _under_way(self, course: Course) -> Iterator[None]:
        self._courses.add(course)
        self._queued += 1
        try:
            with course.logged():
                yield
        finally:
            self._leave_queue(course)
            self._courses.discard(course)

    def _admit(self) -> TokenStreamClient:
        if self._queued >= self._max_queued:
            wait_s = self._pace.wait_s(self._queued, self._clock())
            raise Overloaded(f"the queue is full: {self._queued} requests wait", wait_s)
        stream = self._least_loaded({})
        if stream is None or self._closed is not None:
            raise Unavailable(self._closed or "no attention actor is connected")
        return stream

    def _leave_queue(self, course: Course) -> None:
        self._queued -= course.queued
        course.queued = False

    async def _elsewhere(self, course: Course) -> TokenStreamClient:
        """The actor that a request given back goes on with, as soon as there is one."""
        since_s = self._clock()
        try:
            async with asyncio.timeout(self._patience_s - course.waited_s):
                while (stream := self._least_loaded(course.avoided)) is None and not (course.stopped or self._closed):
                    await self._news.wait()
        except TimeoutError:
            reason = f"no attention actor to go on with in {self._patience_s:g} s: {course.given_back}"
            raise Unavailable(reason) from None
        finally:
            course.waited_s += self._clock() - since_s
        if stream is None or course.stopped or self._closed:
            raise Unavailable(course.stopped or self._closed or course.given_back)
        self._on_moved()
        return stream

    def _least_loaded(self, avoided: Mapping[TokenStreamClient, int]) -> TokenStreamClient | None:
        """`avoided`: streams not to take, unless there was another view since; by the number of the view."""
        live = [stream for link in self._links.values() if (stream := link.stream) is not None]
        able = [stream for stream in live if avoided.get(stream) != self._views]
        return min(able, key=lambda stream: (stream.outstanding, stream.outstanding_tokens), default=None)

    def _announce(self) -> None:
        """Wakes the requests that wait for an actor."""
        self._news.set()
        self._news = asyncio.Event()

    def _part(self, link: AttentionLink, goodbye: Coroutine[Any, Any, None]) -> None:
        async def part() -> None:
            await goodbye
            self._leaving.discard(link)

        task = asyncio.create_task(part())
        self._goodbyes.add(task)
        task.add_done_callback(self._goodbyes.discard)
