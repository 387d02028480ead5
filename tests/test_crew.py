"""The actors of a cluster across the death of the controller that starts them; on a real Ray."""

import asyncio
import uuid
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from actors.controller import NAMESPACE
from actors.crew import Crew
from afd_ray.config import parse_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_nodes")]

TIMEOUT_S = 30.0


def actors_of(crew: Crew) -> set[str]:
    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if actor["name"].startswith(f"afd-{crew.uid}-")}


def groups_of(crew: Crew) -> set[str]:
    tables = placement_group_table().values()
    return {table["name"] for table in tables if table["name"].startswith(f"afd-{crew.uid}-") and table["state"] != "REMOVED"}


async def begin(crew: Crew, number: int, attention: list[str], ffn: list[list[str]]) -> None:
    """Start these, and be gone before anybody could be told of them."""
    started = len(crew.hands) + len(attention) + sum(map(len, ffn))
    providing = asyncio.create_task(crew.provide(number, attention, ffn))
    async with asyncio.timeout(TIMEOUT_S):
        while len(crew.hands) < started:
            await asyncio.sleep(0.01)
    providing.cancel()
    await asyncio.gather(providing, return_exceptions=True)


async def test_an_actor_that_ends_before_it_is_looked_up_stops_nothing(
    tiny_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heir = Crew(parse_config({"model": {"path": str(tiny_directory)}}), b"s" * 32, uuid.uuid4().hex[:8], NAMESPACE, "")
    gone = {"namespace": NAMESPACE, "name": f"afd-{heir.uid}-attention-9"}
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: [gone])
    assert heir.adopt([]) == heir.adopt([]) == []


async def test_the_next_controller_ends_what_the_last_one_had_only_begun_to_start(tiny_directory: Path) -> None:
    config = parse_config({"model": {"path": str(tiny_directory)}})
    crew, heir = (Crew(config, b"s" * 32, uid, NAMESPACE, "") for uid in 2 * [uuid.uuid4().hex[:8]])
    try:
        await begin(crew, 1, ["attention-0"], [])
        described = crew.describe()
        await begin(crew, 2, ["attention-1"], [["ffn-2", "ffn-3"]])
        assert (len(actors_of(crew)), len(groups_of(crew))) == (4, 3)
        assert heir.adopt(described) == []
        async with asyncio.timeout(TIMEOUT_S):
            while (actors_of(crew), groups_of(crew)) != ({f"afd-{crew.uid}-attention-0"}, {f"afd-{crew.uid}-e1-attention-0"}):
                await asyncio.sleep(0.05)
        assert list(heir.hands) == ["attention-0"]
    finally:
        crew.release(list(crew.hands))
    assert groups_of(crew) == set()
