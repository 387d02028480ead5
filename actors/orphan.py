"""An actor that outlives its controller, so that the next one finds it, ends by itself once there will be none."""

import asyncio
import logging
import os

import ray
from ray.util.placement_group import get_current_placement_group, remove_placement_group

from actors.alarm import Alarm

logger = logging.getLogger(__name__)

SILENCE_S = 20.0
"""Without a heartbeat for so long, look whether the controller exists."""


class Orphan:
    """Restarted by each heartbeat; nothing happens before the first."""

    def __init__(self, controller: str) -> None:
        """`controller`: its name, in the namespace of this actor; empty: there is none to wait for."""
        self._controller = controller
        self._silence = Alarm()

    def heard(self) -> None:
        """The controller has just called."""
        if self._controller:
            self._silence.set(SILENCE_S, self._look)

    def close(self) -> None:
        self._silence.call_off()

    def _look(self) -> None:
        self._looking = asyncio.get_running_loop().create_task(self._end_without())

    async def _end_without(self) -> None:
        if await asyncio.to_thread(_exists, self._controller):
            self.heard()
            return
        logger.error("the controller %s is gone for good, and this actor with it", self._controller)
        await asyncio.to_thread(_end)


def _exists(name: str) -> bool:
    """Also while it is being restarted."""
    try:
        ray.get_actor(name)
    except ValueError:
        return False
    return True


def _end() -> None:
    """What is reserved for this actor is given back, and that ends it; the exit is for one without a reservation."""
    group = get_current_placement_group()
    if group is not None:
        remove_placement_group(group)
    os._exit(1)
