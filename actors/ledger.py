"""What outlives the controller: kept in the Ray cluster's own store, from which its successor goes on."""

import pickle
from dataclasses import dataclass

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

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
