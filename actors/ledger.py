"""What outlives the controller: kept in the Ray cluster's own store, from which its successor goes on."""

import json
import pickle
from dataclasses import dataclass
from typing import Any

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from actors.crew import Found
from afd_ray.membership.epoch import Epoch
from afd_ray.membership.events import Record
from placement.groups import Reservation

KEYS = b"afd-ray"


@dataclass(frozen=True, slots=True)
class Entry:
    """One cluster, as its controller knew it last."""

    record: Record
    uid: str
    secret: bytes
    actors: list[tuple[Reservation, list[Found | None]]]
    loads: tuple[int, ...]
    epochs: dict[int, Epoch]
    """By number: of the rosters that the record is about."""


def read(name: str) -> Entry | None:
    """What the controller of this name left, if it did not end in an orderly way."""
    kept = _internal_kv_get(name.encode(), namespace=KEYS)
    # Written by `write`, in a store that only members of the Ray cluster reach.
    return pickle.loads(kept) if kept else None


def write(name: str, entry: Entry) -> None:
    """At once: returns when the store has it."""
    _internal_kv_put(name.encode(), pickle.dumps(entry), overwrite=True, namespace=KEYS)


def erase(name: str) -> None:
    """The cluster has ended; harmless when there is nothing."""
    _internal_kv_del(name.encode(), namespace=KEYS)
    _internal_kv_del(f"{name}/".encode(), del_by_prefix=True, namespace=KEYS)


class Shelf:
    """What a cluster's controller keeps in pieces beside its entry: JSON values by key, gone with the entry."""

    def __init__(self, name: str) -> None:
        self._prefix = f"{name}/".encode()

    def put(self, key: str, value: Any) -> None:
        """At once, as `write`. TypeError or ValueError for what is no JSON value."""
        _internal_kv_put(self._prefix + key.encode(), json.dumps(value).encode(), overwrite=True, namespace=KEYS)

    def drop(self, key: str) -> None:
        """Harmless when there is nothing."""
        _internal_kv_del(self._prefix + key.encode(), namespace=KEYS)

    def read(self) -> dict[str, Any]:
        """All of it."""
        keys = _internal_kv_list(self._prefix, namespace=KEYS)
        kept = {key: _internal_kv_get(key, namespace=KEYS) for key in keys}
        return {key.removeprefix(self._prefix).decode(): json.loads(value) for key, value in kept.items() if value}
