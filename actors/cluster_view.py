"""The cluster as somebody outside sees it: the controller's answers, its view of the attention actors, and a pool that follows it."""

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.attention_pool import PATIENCE_S, AttentionPool
from actors.http.backend import Rejected, Unavailable
from actors.token_client import TokenStreamClient

logger = logging.getLogger(__name__)

NOTHING: Mapping[str, Any] = {}
RETRY_S = 0.5
ANSWER_TIMEOUT_S = 10.0


class ClusterView:
    """Goes on with the view it has while no controller answers, and looks for the controller again."""

    def __init__(
        self,
        find_controller: Callable[[], Any],
        *,
        client_id: str,
        max_queued: int = sys.maxsize,
        patience_s: float | None = None,
        on_moved: Callable[[], None] = lambda: None,
    ) -> None:
        """`find_controller` gives the controller's handle, or raises ValueError while there is none. `patience_s` None: the pool's own."""
        self.pool = AttentionPool(self._connect, max_queued=max_queued, patience_s=patience_s or PATIENCE_S, on_moved=on_moved)
        self.state = "starting"
        self.latest: dict[str, Any] | None = None
        self._find_controller, self._client_id = find_controller, client_id
        self._controller: Any = None
        self._secret = b""
        self._seen: tuple[Any, ...] = (-1, "starting")

    async def ask(self, method: str, *args: Any, timeout_s: float | None = None, named: Mapping[str, Any] = NOTHING) -> Any:
        """A controller method's answer, called with `args` and `named`; ValueError and Rejected tell what it said, a controller that is gone or silent is Unavailable."""
        if self._controller is None:
            try:
                self._controller = self._find_controller()
            except ValueError as error:
                raise Unavailable(f"no controller: {_line(error)}") from None
        try:
            async with asyncio.timeout(timeout_s):
                return await getattr(self._controller, method).remote(*args, **named)
        except RayTaskError as error:
            line = _line(error.cause)
            raise (ValueError(line) if isinstance(error.cause, ValueError) else Rejected(line)) from None
        except RayActorError as error:
            self._controller = None
            raise Unavailable(f"the controller does not answer: {_line(error)}") from None
        except TimeoutError:
            raise Unavailable(f"the controller did not answer in {timeout_s:g} s") from None

    async def refresh(self) -> dict[str, Any]:
        """Takes the cluster's present view, and gives it."""
        view: dict[str, Any] = await self.ask("ingress_view", timeout_s=ANSWER_TIMEOUT_S)
        self._seen = (view["epoch"], view["state"], *([view["version"]] if "version" in view else []))
        addresses = {actor["id"]: actor["address"] for actor in view["attention"]}
        if view["state"] == "stopping":
            self.state = "stopping"
            self.pool.end("the server is stopping")
        elif addresses or view["state"] != "starting":
            self._secret, self.state, self.latest = view["secret"], view["state"], view
            self.pool.follow(addresses, view.get("lost", ()))
        # A controller that has only just begun knows of no actor: that says nothing of those there are.
        return view

    async def follow(self, on_view: Callable[[dict[str, Any]], Any] | None = None) -> None:
        """Refreshes the view whenever the cluster changes, until cancelled."""
        told = ""
        while True:
            try:
                view = await self.refresh()
                if on_view is not None:
                    await on_view(view)
                told = ""
                await self.ask("changed", *self._seen)
            except (RuntimeError, RayError, OSError, ValueError) as error:
                if str(error) != told:
                    logger.warning("cluster view: %s", error)
                told = str(error)
                await asyncio.sleep(RETRY_S)

    async def _connect(self, address: str) -> TokenStreamClient:
        return await TokenStreamClient.connect(address, secret=self._secret, ingress_id=self._client_id)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
