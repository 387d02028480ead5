"""Groups over shared memory and sockets: what arrives, what is refused, and what a lost peer looks like."""

import logging
import pickle
import queue
import random
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from afd_ray.handoff.mesh import LinkKind, RingMesh, open_mesh
from afd_ray.handoff.message import Header, Kind, LinkError, Message

SECRET = b"a cluster secret"
RING_BYTES = 1 << 16
KINDS: tuple[LinkKind, ...] = ("shm", "tcp", "gloo")
Open = Callable[..., RingMesh]


def segments() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("afd-ray-*")}


@pytest.fixture
def opened() -> Iterator[Open]:
    """Opens members and closes them after the test."""
    members: list[RingMesh] = []

    def open_member(
        rank: int,
        world_size: int = 2,
        kind: LinkKind = "auto",
        epoch: int = 0,
        digest: int = 0,
        secret: bytes = SECRET,
        ring_bytes: int = RING_BYTES,
        send_timeout_s: float = 0.2,
        silence_s: float | None = None,
    ) -> RingMesh:
        peers = {peer: ring_bytes for peer in range(world_size) if peer != rank}
        member = open_mesh(
            rank,
            world_size,
            epoch,
            secret=secret,
            host="127.0.0.1",
            peers=peers,
            kind=kind,
            digest=digest,
            send_timeout_s=send_timeout_s,
            silence_s=silence_s,
        )
        members.append(member)
        return member

    yield open_member
    for member in members:
        member.close()


def join(members: list[RingMesh]) -> None:
    """Connect members of one group that live in this process, all at once."""
    endpoints = {member.rank: member.endpoint for member in members}
    failures: list[Exception] = []

    def join_one(member: RingMesh) -> None:
        try:
            member.connect(endpoints, timeout_s=10)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=join_one, args=(member,)) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def pair(opened: Open, kind: LinkKind, ring_bytes: int = RING_BYTES, send_timeout_s: float = 0.2) -> tuple[RingMesh, RingMesh]:
    members = [opened(rank, kind=kind, ring_bytes=ring_bytes, send_timeout_s=send_timeout_s) for rank in range(2)]
    join(members)
    return members[0], members[1]


def next_message(mesh: RingMesh, timeout_s: float = 10.0) -> Message:
    deadline_s = time.monotonic() + timeout_s
    while (message := mesh.receive()) is None:
        left_s = deadline_s - time.monotonic()
        assert left_s > 0, "no message arrived"
        mesh.wait(left_s)
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_every_size_cross_both_ways(opened: Open, kind: LinkKind) -> None:
    first, second = pair(opened, kind)
    assert first.edge_kinds() == {1: kind}
    for step, rows in enumerate([0, 1, 7, 100, 3, 100] * 4):
        hidden = torch.randn(rows, 64).to(torch.bfloat16)
        ids = torch.randint(0, 100, (rows, 3), dtype=torch.int16)
        header = Header(Kind.DISPATCH, epoch=0, source=0, step=step, rows=rows)
        first.send(1, header, [hidden, ids])
        message = next_message(second)
        assert message.header == header
        assert torch.equal(message.tensors[0], hidden)
        assert torch.equal(message.tensors[1], ids)
        second.send(0, Header(Kind.PARTIAL, epoch=0, source=1, step=step), [message.tensors[0].float()])
        message.release()
        back = next_message(first)
        assert torch.equal(back.tensors[0], hidden.float())
        back.release()
    assert first.edge_counts()[1].sent_messages == 25  # one of them warmed the edge up
    assert first.edge_counts()[1] == second.edge_counts()[0]._replace(
        sent_messages=25,
        sent_bytes=second.edge_counts()[0].received_bytes,
        received_messages=25,
        received_bytes=second.edge_counts()[0].sent_bytes,
    )


def test_one_group_mixes_shared_memory_and_sockets(opened: Open) -> None:
    members = [opened(0, 3), opened(1, 3), opened(2, 3, kind="tcp")]
    join(members)
    assert [member.edge_kinds() for member in members] == [{1: "shm", 2: "tcp"}, {0: "shm", 2: "tcp"}, {0: "tcp", 1: "tcp"}]
    for step in range(20):
        for source in (1, 2):
            members[source].send(0, Header(Kind.TENSOR, epoch=0, source=source, step=step), [torch.tensor([source * 100 + step])])
    arrived: dict[int, list[int]] = {1: [], 2: []}
    for _ in range(40):
        message = next_message(members[0])
        arrived[message.header.source].append(int(message.tensors[0]))
        message.release()
    assert arrived == {source: [source * 100 + step for step in range(20)] for source in (1, 2)}


@pytest.mark.parametrize("source", [1, 2])
def test_a_parked_member_of_a_mixed_group_hears_every_kind(opened: Open, source: int) -> None:
    members = [opened(0, 3), opened(1, 3), opened(2, 3, kind="tcp")]
    join(members)
    arrived: list[int] = []

    def read() -> None:
        for _ in range(50):
            message = next_message(members[0])
            arrived.append(message.header.step)
            message.release()
            members[0].send(source, Header(Kind.TENSOR, epoch=0, source=0, step=message.header.step))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for step in range(50):
        members[source].send(0, Header(Kind.TENSOR, epoch=0, source=source, step=step))
        assert next_message(members[source]).header.step == step
    reader.join(timeout=10)
    assert arrived == list(range(50))


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_of_all_sizes_arrives_whole_however_it_is_cut(opened: Open, kind: LinkKind) -> None:
    first, second = pair(opened, kind, ring_bytes=1 << 20, send_timeout_s=10)
    draw = random.Random(7)
    sent = [torch.full((draw.choice([0, 1, 300, 5_000, 70_000, 200_000]),), step % 251, dtype=torch.uint8) for step in range(300)]

    def send() -> None:
        for step, tensor in enumerate(sent):
            first.send(1, Header(Kind.TENSOR, epoch=0, source=0, step=step), [tensor])

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    held: deque[Message] = deque()
    for step, tensor in enumerate(sent):
        held.append(next_message(second))
        assert held[-1].header.step == step
        assert torch.equal(held[-1].tensors[0], tensor)
        while len(held) > draw.randrange(2):
            held.popleft().release()
    sender.join(timeout=10)
    assert second.edge_counts()[0].received_messages == 301  # one of them warmed the edge up


def test_a_large_message_arrives_while_its_receiver_computes(opened: Open) -> None:
    first, second = pair(opened, "tcp", ring_bytes=32 << 20)
    assert second.receive() is None
    large = torch.ones(15 << 20, dtype=torch.uint8)  # more than the kernel holds on both sides
    first.send(1, Header(Kind.TENSOR, epoch=0, source=0), [large])
    deadline_s = time.monotonic() + 10
    while (message := second._inbound[0].receive()) is None:  # what lies in the ring, without a look at the sockets
        assert time.monotonic() < deadline_s
    assert torch.equal(message.tensors[0], large)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_edge_fails_after_its_deadline_and_delivers_what_it_took(opened: Open, kind: LinkKind) -> None:
    first, second = pair(opened, kind)
    taken = 0
    payload = torch.zeros(RING_BYTES // 2, dtype=torch.uint8)
    refusal = ""
    while taken < 10_000 and not refusal:
        try:
            first.send(1, Header(Kind.TENSOR, epoch=0, source=0, step=taken), [payload])
            taken += 1
        except LinkError as error:
            refusal = str(error)
    assert refusal.startswith("edge to rank 1: its ")
    assert refusal.endswith(" stayed full for 0.2 s")
    for step in range(taken):
        message = next_message(second)
        assert message.header.step == step
        message.release()


def test_a_message_larger_than_the_ring_is_refused(opened: Open) -> None:
    for kind in ("shm", "tcp"):
        first, _ = pair(opened, kind)
        with pytest.raises(ValueError, match="its ring holds 65536"):
            first.send(1, Header(Kind.TENSOR, epoch=0, source=0), [torch.zeros(RING_BYTES, dtype=torch.uint8)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_stale_epoch_and_a_false_source_never_reach_the_engine(opened: Open, kind: LinkKind) -> None:
    first, second = pair(opened, kind)
    first.send(1, Header(Kind.TENSOR, epoch=3, source=0, step=1), [torch.ones(1)])
    first.send(1, Header(Kind.TENSOR, epoch=0, source=0, step=2), [torch.ones(1)])
    assert next_message(second).header.step == 2
    assert second.stale_messages == 1
    first.send(1, Header(Kind.TENSOR, epoch=0, source=1))
    with pytest.raises(LinkError, match="claims to come from rank 1"):
        next_message(second)


@pytest.mark.parametrize("kind", KINDS)
def test_close_wakes_a_waiting_reader_after_what_was_sent(opened: Open, kind: LinkKind) -> None:
    first, second = pair(opened, kind)
    outcome: list[object] = []

    def read() -> None:
        try:
            while True:
                message = next_message(first)
                outcome.append(message.header.kind)
                message.release()
        except LinkError as error:
            outcome.append(str(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    second.send(0, Header(Kind.STOP, epoch=0, source=1), [torch.zeros(1000)])
    second.close()
    reader.join(timeout=10)
    assert outcome == [Kind.STOP, "edge to rank 1: closed by the peer"]
    with pytest.raises(LinkError, match="closed"):
        first.send(1, Header(Kind.TENSOR, epoch=0, source=0))
    with pytest.raises(LinkError, match="this mesh is closed"):
        second.receive()


def test_wake_from_another_thread_ends_a_wait(opened: Open) -> None:
    first, _ = pair(opened, "shm")
    waiter = waiting(first)
    first.wake()
    waiter.join(timeout=10)
    assert not waiter.is_alive()


def waiting(mesh: RingMesh) -> threading.Thread:
    waiter = threading.Thread(target=mesh.wait, args=(None,), daemon=True)
    waiter.start()
    return waiter


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_on_a_broken_edge(opened: Open, kind: LinkKind) -> None:
    first, second = pair(opened, kind)
    second.close()
    for _ in range(2):
        waiter = waiting(first)
        waiter.join(timeout=10)
        assert not waiter.is_alive()


@pytest.mark.parametrize("kind", KINDS)
def test_a_parked_reader_passes_the_end_of_its_ring(opened: Open, kind: LinkKind) -> None:
    first, second = pair(opened, kind)
    sizes = [RING_BYTES // 2, RING_BYTES - 1024] * 3
    arrived: list[int] = []

    def read() -> None:
        for _ in sizes:
            message = next_message(second)
            arrived.append(message.tensors[0].numel())
            message.release()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    for size_bytes in sizes:
        first.send(1, Header(Kind.TENSOR, epoch=0, source=0), [torch.zeros(size_bytes, dtype=torch.uint8)])
    reader.join(timeout=10)
    assert arrived == sizes


def test_strangers_are_refused_while_the_group_forms(opened: Open, caplog: pytest.LogCaptureFixture) -> None:
    members = [opened(rank) for rank in range(2)]
    intruder = opened(0, kind="tcp", secret=b"another secret")
    port = members[1].endpoint.port
    with caplog.at_level(logging.WARNING), closing(socket.create_connection(("127.0.0.1", port))) as rubbish:
        rubbish.sendall(b"GET / HTTP/1.1\r\n" * 20)
        with pytest.raises(LinkError, match=r"edge to rank 1: handshake .* the same cluster secret"):
            intruder.connect({1: members[1].endpoint}, timeout_s=10)
        rubbish.settimeout(10)
        while_refused = b"".join(iter(lambda: _read(rubbish), b""))
    assert SECRET not in while_refused
    assert caplog.text.count("it does not know the cluster secret") == 2
    join(members)
    members[0].send(1, Header(Kind.TENSOR, epoch=0, source=0))
    assert next_message(members[1]).header.source == 0


def _read(connection: socket.socket) -> bytes:
    try:
        return connection.recv(100)
    except ConnectionResetError:
        return b""


def test_after_the_handshake_rubbish_breaks_that_edge_only(opened: Open) -> None:
    members = [opened(rank, 3, kind="tcp") for rank in range(3)]
    join(members)
    members[2]._outbound[0]._connection.send(b"rubbish" * 64)  # type: ignore[union-attr]
    members[1].send(0, Header(Kind.TENSOR, epoch=0, source=1))
    sources: set[int] = set()
    refusals: set[str] = set()
    while not (sources and refusals):
        try:
            sources.add(next_message(members[0]).header.source)
        except LinkError as error:
            refusals.add(str(error))
    assert sources == {1}
    assert refusals.pop().startswith("edge to rank 2: frame begins with magic 0x62627572 and version")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mismatch_is_named(opened: Open, kind: LinkKind) -> None:
    first, second = opened(0, kind=kind, digest=0xA), opened(1, kind=kind, digest=0xB)
    with pytest.raises(LinkError, match=r"edge to rank 1: contract digest is 000000000000000b there, 000000000000000a here"):
        first.connect({1: second.endpoint}, timeout_s=10)
    older, newer = opened(0, kind=kind, epoch=4), opened(1, kind=kind, epoch=5)
    with pytest.raises(LinkError, match=r"edge to rank 1: handshake .* epoch is 5 there, 4 here"):
        older.connect({1: newer.endpoint}, timeout_s=10)


def test_a_missing_rank_is_named(opened: Open) -> None:
    members = [opened(rank, 3) for rank in range(3)]
    endpoints = {member.rank: member.endpoint for member in members}
    with pytest.raises(LinkError, match="missing ranks: 2"):
        members[0].connect({1: endpoints[1]}, timeout_s=10)
    members[2].close()
    with pytest.raises(LinkError, match=r"edge to rank 2: 127.0.0.1:.* cannot be reached"):
        members[1].connect(endpoints, timeout_s=10)
    lonely, silent = opened(0), opened(1)
    with pytest.raises(LinkError, match=r"edge to rank 1: it has not connected in 0.05 s; missing ranks: 1"):
        lonely.connect({1: silent.endpoint}, timeout_s=0.05)


def test_an_edge_that_cannot_be_had_is_named_by_its_ends_and_holds_nobody_else_up(opened: Open) -> None:
    """As after a cut between ranks 0 and 1: each finds a door at which nobody answers in place of the other's."""
    members = [opened(rank, 3) for rank in range(3)]
    endpoints = {member.rank: member.endpoint for member in members}
    with closing(socket.create_server(("127.0.0.1", 0))) as deaf:
        nowhere = {rank: replace(endpoints[rank], port=deaf.getsockname()[1]) for rank in range(2)}
        seen = [endpoints | {1: nowhere[1]}, endpoints | {0: nowhere[0]}, endpoints]
        with ThreadPoolExecutor(3) as pool:
            ends = [pool.submit(member.connect, view, 1.0) for member, view in zip(members, seen, strict=True)]
    errors = [end.exception() for end in ends]
    assert [error.peer if isinstance(error, LinkError) else None for error in errors] == [1, 0, None]


def test_a_peer_whose_kernel_answers_nothing_is_out_of_reach_long_before_the_time_to_connect_is_over(opened: Open) -> None:
    member, peer = opened(0, silence_s=0.5), opened(1)
    with socket.socket() as deaf, socket.socket() as first:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        first.connect(deaf.getsockname())  # nobody takes it: the queue is full, and who dials now is not answered
        nowhere = replace(peer.endpoint, port=deaf.getsockname()[1])
        with pytest.raises(LinkError, match="edge to rank 1: no answer from"):
            member.connect({1: nowhere}, timeout_s=3600)


def test_an_error_names_the_peer_in_another_process_too() -> None:
    error = pickle.loads(pickle.dumps(LinkError(3, "gone")))
    assert (str(error), error.peer, error.reason) == ("edge to rank 3: gone", 3, "gone")


@pytest.mark.parametrize("kind", KINDS)
def test_who_does_not_receive_is_told_of_a_break_too(opened: Open, kind: LinkKind) -> None:
    first, second = pair(opened, kind)
    broken: queue.SimpleQueue[LinkError] = queue.SimpleQueue()
    first.on_broken(broken.put)
    second.close()
    assert broken.get(timeout=10).peer == 1


@pytest.mark.parametrize("way", ["in", "out"])
def test_one_end_hears_of_a_socket_that_is_shut_down_though_the_other_does_nothing(opened: Open, way: str) -> None:
    first, second = pair(opened, "tcp")
    broken: queue.SimpleQueue[LinkError] = queue.SimpleQueue()
    first.on_broken(broken.put)
    dialled = (first if way == "out" else second)._outbound[1 if way == "out" else 0]
    dialled._connection.shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
    assert broken.get(timeout=10).peer == 1


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_closing_ends_a_connect_that_waits_for_a_peer(opened: Open, kind: LinkKind) -> None:
    first, second = opened(0, kind=kind), opened(1, kind=kind)
    errors: list[Exception] = []

    def connect() -> None:
        try:
            first.connect({1: second.endpoint}, 60.0)
        except LinkError as error:
            errors.append(error)

    connecting = threading.Thread(target=connect)
    connecting.start()
    first.close()
    connecting.join(10.0)
    assert not connecting.is_alive()
    assert len(errors) == 1


def test_nothing_stays_in_shared_memory_once_the_group_stands(opened: Open) -> None:
    members = [opened(rank, kind="shm") for rank in range(2)]
    names = {member.endpoint.segment for member in members}
    assert names <= segments()
    assert all((Path("/dev/shm") / name).stat().st_mode & 0o777 == 0o600 for name in names)
    join(members)
    assert not names & segments()
    lonely = opened(0, kind="shm")
    lonely.close()
    assert lonely.endpoint.segment not in segments()
