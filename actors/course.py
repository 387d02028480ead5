"""One request's course over the attention actors: what its client has of it, and where it cannot go on."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace

from actors.http.backend import Unavailable
from actors.request_log import requests
from actors.token_client import Answers, TokenStreamClient
from actors.token_frames import Answer, Moved, Refused
from actors.token_stream import Lost
from afd_ray.membership.attempts import Journal
from afd_ray.request import FinishReason, KVTicket, Request, TokenOutput

MAX_ENGINE_FAILURES = 3
"""In a row, without a token: the request may be what engines fail of, and must not take one after the other with it."""


class Course:
    """Each submission to an actor is an attempt; the tokens of the last one alone are believed. One event loop only."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.queued = True
        """Until its first token."""
        self.over = False
        """Whether its last output is out."""
        self.given_back = ""
        """One line: why it is with no actor now."""
        self.avoided: dict[TokenStreamClient, int] = {}
        """Streams that it came back from, and in which of the pool's views."""
        self.waited_s = 0.0
        """For an actor to go on with, since its last token."""
        self.stopped: str | None = None
        """One line, once it is to end."""
        self._journal = Journal()
        self._ticket: KVTicket | None = None
        self._answers: Answers | None = None
        self._engine_failures = 0

    @property
    def ended_by(self) -> FinishReason | None:
        """Why no token can follow those that there are; None where one can."""
        tokens, params = self._journal.tokens, self.request.params
        if tokens and tokens[-1] in params.stop_token_ids:
            return "stop"
        return "length" if params.max_tokens is not None and len(tokens) >= params.max_tokens else None

    async def attempt(self, stream: TokenStreamClient) -> AsyncGenerator[TokenOutput, None]:
        """Its outputs from one actor, until it is over or the actor has no more to say. Closing this early aborts it there.

        ValueError when the engine refuses it, Unavailable when it is not to go on.
        """
        number, position = self._journal.begin(), len(self._journal.tokens)
        # An id of its own: nothing that is still said or done about an earlier attempt concerns this one.
        request = self.request if number == 1 else replace(self.request, id=f"{self.request.id}~{number}")
        ticket, self._ticket = self._ticket, None
        requests.info("%s goes to %s after %d tokens", request.id, stream.address, position)
        answers = self._answers = stream.submit(request, self._journal.tokens, ticket)
        try:
            while isinstance(answer := await answers.get(), TokenOutput):
                if answer.token_id is not None:
                    if not self._journal.accept(number, position, answer.token_id):
                        continue
                    position += 1
                    self.waited_s, self._engine_failures = 0.0, 0
                self.over = answer.finish_reason is not None
                yield answer if number == 1 else replace(answer, request_id=self.request.id)
                if self.over:
                    return
            self._take_back(answer)
        finally:
            self._answers = None
            stream.abort(request.id)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """How it ended, once this is left."""
        ending = "is given up by its client"
        try:
            yield
        except Exception as error:
            ending = f"fails ({error})"
            raise
        finally:
            if self.over or self.ended_by:
                ending = "is over"
            requests.info("%s %s after %d tokens", self.request.id, ending, len(self._journal.tokens))

    def stop(self, reason: str) -> None:
        """End it, Unavailable, wherever it is."""
        self.stopped = reason
        if self._answers is not None:
            self._answers.put_nowait(Lost(self.request.id, reason))

    def _take_back(self, last: Answer | Lost) -> None:
        if isinstance(last, Refused):
            if not self._journal.tokens:
                raise ValueError(last.reason)
            self.given_back = last.reason  # another actor took it: this one has less room
        elif isinstance(last, Lost):
            self.given_back = last.reason
        elif isinstance(last, Moved):
            self.given_back = last.failure or "its attention actor leaves"
            self._ticket = last.ticket
            self._engine_failures += bool(last.failure)
            if self._engine_failures >= MAX_ENGINE_FAILURES:
                raise Unavailable(last.failure)
        requests.info("%s is back after %d tokens: %s", self.request.id, len(self._journal.tokens), self.given_back)
