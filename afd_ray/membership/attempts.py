"""What an ingress keeps of a request, so that any attention actor can go on with it; and which actor's tokens it believes."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Succession:
    """Of two epochs never both emit: what an ingress sees of that in the tokens that it lets through, whichever requests they are of."""

    newest: int = 0
    stale: int = 0
    """Tokens of an epoch that came after one of a later epoch. 0, but for what a slow link held back while the others switched."""

    def note(self, epoch: int) -> None:
        if epoch < self.newest:
            self.stale += 1
        self.newest = max(self.newest, epoch)


@dataclass(slots=True)
class Journal:
    """One request's tokens as its client has them. Each submission to an attention actor is an attempt; only the last one is believed.

    The prompt and parameters stay with the request; prompt plus `tokens` is what the next attempt is given.
    """

    attempt: int = 0
    """Of the submission that is believed; 0 before the first."""
    tokens: list[int] = field(default_factory=list)

    def begin(self) -> int:
        """Start an attempt, which goes on at position `len(tokens)`; gives its number. Whatever earlier ones still say is dropped."""
        self.attempt += 1
        return self.attempt

    def accept(self, attempt: int, position: int, token: int) -> bool:
        """Take the token in if it is the next one, of the attempt that is believed; False: it must not reach the client.

        A position beyond the next one means that a token was lost on the way: the caller begins a new attempt.
        """
        if attempt != self.attempt or position != len(self.tokens):
            return False
        self.tokens.append(token)
        return True
