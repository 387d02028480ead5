"""What a member takes and gives back: its segment, its descriptors, its endpoint, its arguments."""

import gc
import json
import os
import threading
from contextlib import closing
from pathlib import Path

import pytest

from afd_ray.handoff import shm
from afd_ray.handoff.mesh import Endpoint, LinkKind, RingMesh, open_mesh

SECRET = b"a cluster secret"
SHM = Path("/dev/shm")


def open_member(rank: int, kind: LinkKind) -> RingMesh:
    return open_mesh(rank, 2, 0, secret=SECRET, host="127.0.0.1", peers={1 - rank: 1 << 16}, kind=kind)


def test_a_dead_owner_s_segment_is_swept() -> None:
    orphan = SHM / "afd-ray-00orphan"
    orphan.write_bytes(bytes(16))
    with closing(open_member(0, "shm")) as alive:
        assert not orphan.exists()
        with closing(open_member(1, "shm")):
            assert (SHM / alive.endpoint.segment).exists()


def test_an_endpoint_survives_json() -> None:
    with closing(open_member(0, "auto")) as member:
        endpoint = member.endpoint
    assert Endpoint.from_dict(json.loads(json.dumps(endpoint.to_dict()))) == endpoint
    with pytest.raises(ValueError, match="endpoint lacks port"):
        Endpoint.from_dict({key: value for key, value in endpoint.to_dict().items() if key != "port"})


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="kind is 'rdma', allowed: auto, shm, tcp, gloo"):
        open_mesh(0, 2, 0, secret=SECRET, host="127.0.0.1", peers={1: 64}, kind="rdma")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank 2 is not a peer of rank 0 in a group of 2"):
        open_mesh(0, 2, 0, secret=SECRET, host="127.0.0.1", peers={2: 64})
    with pytest.raises(ValueError, match="ring capacity for rank 1 is 65"):
        open_mesh(0, 2, 0, secret=SECRET, host="127.0.0.1", peers={1: 65})


def test_a_foreign_host_is_named_and_leaves_no_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "DIRECTORY", tmp_path)
    with pytest.raises(OSError, match=r"cannot listen on host 203\.0\.113\.1"):
        open_mesh(0, 2, 0, secret=SECRET, host="203.0.113.1", peers={1: 4096})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_closed_members_leave_no_descriptor_and_no_mapping(kind: LinkKind) -> None:
    gc.collect()
    gc.disable()
    try:
        before = resources()
        for _ in range(3):
            members = [open_member(rank, kind) for rank in range(2)]
            endpoints = {member.rank: member.endpoint for member in members}
            threads = [threading.Thread(target=member.connect, args=(endpoints, 10)) for member in members]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for member in members:
                member.close()
            del members, member, threads, thread
        assert resources() == before
    finally:
        gc.enable()


def resources() -> tuple[int, int, int]:
    """Open descriptors, mapped segments and threads of this process."""
    maps = Path("/proc/self/maps").read_text()
    return len(os.listdir("/proc/self/fd")), maps.count("afd-ray-"), threading.active_count()
