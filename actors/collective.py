"""The collective backend AFD: a group of ray.util.collective whose members hand tensors over a mesh."""

import re
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, cast

import numpy as np
import ray.util.collective as col
import torch
from ray.util.collective.backend_registry import _global_registry, register_collective_backend
from ray.util.collective.collective_group.base_collective_group import BaseGroup
from ray.util.collective.types import (
    AllGatherOptions,
    AllReduceOptions,
    BarrierOptions,
    BroadcastOptions,
    RecvOptions,
    ReduceOp,
    ReduceOptions,
    ReduceScatterOptions,
    SendOptions,
)
from torch import Tensor

from afd_ray.handoff.device.carrier import Carrier
from afd_ray.handoff.device.device_mesh import DeviceMesh
from afd_ray.handoff.device.streams import Device
from afd_ray.handoff.mesh import Endpoint, LinkKind, RingMesh, open_mesh
from afd_ray.handoff.message import ALIGNMENT, HEADER_BYTES, Header, Kind, Message

BACKEND = "AFD"
DEFAULT_TIMEOUT_S = 30.0

_EPOCH = re.compile(r"-e(\d+)$")


def register_backend() -> None:
    """Make the backend known to ray.util.collective in this process; once is enough, more is harmless."""
    if not _global_registry.is_registered(BACKEND):
        register_collective_backend(BACKEND, AFDGroup)


def join_group(world_size: int, rank: int, group_name: str) -> "AFDGroup":
    """A group of this process by the public API; not yet open. It waits for a lock of the whole process."""
    register_backend()
    # Ray types the name of a backend as one of its own two.
    col.init_collective_group(world_size, rank, cast(Any, BACKEND), group_name)
    group: AFDGroup = col.get_group_handle(group_name)
    return group


def leave_group(group_name: str) -> None:
    """Forget the group and leave it, if this process is in it; asks Ray's head, so not on an event loop."""
    if col.is_group_initialized(group_name):
        col.destroy_collective_group(group_name)


def epoch_of(group_name: str) -> int:
    """The epoch in a name such as `afd-demo-e7`; 0 in a name without one."""
    found = _EPOCH.search(group_name)
    return int(found[1]) if found else 0


class AFDGroup(BaseGroup):
    """One member of a group.

    It is made at once; `open` then listens, `connect` joins the peers, and the step loops use `mesh`. The collective
    operations serve the public API of ray.util.collective: they want an edge to every rank, and no step loop on the mesh
    at the same time. Their results do not depend on timing: contributions are combined in the order of ranks.
    """

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)
        self.epoch = epoch_of(group_name)
        self._mesh: RingMesh | DeviceMesh | None = None
        self._arrived: dict[int, deque[Message]] = {peer: deque() for peer in range(world_size) if peer != rank}

    @classmethod
    def backend(cls) -> str:
        return BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        return True

    def open(
        self,
        *,
        secret: bytes,
        host: str,
        peers: Mapping[int, int],
        kind: LinkKind = "auto",
        spin_us: float = 0.0,
        digest: int = 0,
        send_timeout_s: float = 10.0,
        silence_s: float | None = None,
    ) -> Endpoint:
        """Listen, and make a ring for each of `peers` (rank: capacity in bytes); the endpoint is for the peers."""
        if self._mesh is not None:
            raise RuntimeError(f"group {self.group_name} is open already")
        self._mesh = open_mesh(
            self.rank,
            self.world_size,
            self.epoch,
            secret=secret,
            host=host,
            peers=peers,
            kind=kind,
            spin_us=spin_us,
            digest=digest,
            send_timeout_s=send_timeout_s,
            silence_s=silence_s,
        )
        return self._mesh.endpoint

    def carry(self, carrier: Carrier, device: Device) -> None:
        """Rows go by this carrier; between `open` and `connect`."""
        if not isinstance(self._mesh, RingMesh):
            raise RuntimeError(f"group {self.group_name} is not open, or carries rows already")
        self._mesh = DeviceMesh(self._mesh, carrier, device)

    @property
    def mesh(self) -> RingMesh | DeviceMesh:
        if self._mesh is None:
            raise RuntimeError(f"group {self.group_name} is not open")
        return self._mesh

    @property
    def endpoint(self) -> Endpoint:
        return self.mesh.endpoint

    def connect(self, endpoints: Mapping[int, Endpoint], timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """Build every edge and carry a large message over each; errors name the rank (see RingMesh)."""
        self.mesh.connect(endpoints, timeout_s)

    def destroy_group(self) -> None:
        """Leave at once; the peers' readers get LinkError."""
        if self._mesh is not None:
            self._mesh.close()

    def send(self, tensors: Sequence[Any], send_options: SendOptions) -> None:
        """Returns when the tensor is copied into the edge's buffer."""
        self._exchange({send_options.dst_rank: _flat(tensors)}, {}, DEFAULT_TIMEOUT_S)

    isend = send

    def recv(self, tensors: Sequence[Any], recv_options: RecvOptions) -> None:
        self._receive_into({recv_options.src_rank: _tensor(tensors)}, {}, DEFAULT_TIMEOUT_S)

    def barrier(self, barrier_options: BarrierOptions = BarrierOptions()) -> None:  # noqa: B008
        token = torch.zeros(1, dtype=torch.uint8)
        self._gather(token, dict.fromkeys(self._arrived, token), _timeout_s(barrier_options))

    def allreduce(self, tensors: Sequence[Any], allreduce_options: AllReduceOptions = AllReduceOptions()) -> None:  # noqa: B008
        tensor = _tensor(tensors)
        parts = self._gather(tensor, dict.fromkeys(self._arrived, tensor), _timeout_s(allreduce_options))
        tensor.copy_(_combined(parts, allreduce_options.reduceOp))

    def reduce(self, tensors: Sequence[Any], reduce_options: ReduceOptions = ReduceOptions()) -> None:  # noqa: B008
        tensor = _tensor(tensors)
        root, timeout_s = reduce_options.root_rank, _timeout_s(reduce_options)
        if self.rank != root:
            self._exchange({root: _bytes_of(tensor)}, {}, timeout_s)
            return
        parts = self._gather(tensor, {}, timeout_s)
        tensor.copy_(_combined(parts, reduce_options.reduceOp))

    def broadcast(self, tensors: Sequence[Any], broadcast_options: BroadcastOptions = BroadcastOptions()) -> None:  # noqa: B008
        tensor = _tensor(tensors)
        root, timeout_s = broadcast_options.root_rank, _timeout_s(broadcast_options)
        if self.rank == root:
            self._exchange({peer: _bytes_of(tensor) for peer in self._arrived}, {}, timeout_s)
        else:
            self._receive_into({root: tensor}, {}, timeout_s)

    def allgather(
        self,
        tensor_lists: Sequence[Sequence[Any]],
        tensors: Sequence[Any],
        allgather_options: AllGatherOptions = AllGatherOptions(),  # noqa: B008
    ) -> None:
        tensor = _tensor(tensors)
        parts = self._gather(tensor, dict.fromkeys(self._arrived, tensor), _timeout_s(allgather_options))
        for result, part in zip(_all(tensor_lists), parts, strict=True):
            result.copy_(part)

    def reducescatter(
        self,
        tensors: Sequence[Any],
        tensor_lists: Sequence[Sequence[Any]],
        reducescatter_options: ReduceScatterOptions = ReduceScatterOptions(),  # noqa: B008
    ) -> None:
        given = _all(tensor_lists)
        outgoing = {peer: given[peer] for peer in self._arrived}
        parts = self._gather(given[self.rank], outgoing, _timeout_s(reducescatter_options))
        _tensor(tensors).copy_(_combined(parts, reducescatter_options.reduceOp))

    def _gather(self, own: Tensor, outgoing: Mapping[int, Tensor], timeout_s: float) -> list[Tensor]:
        """Tensors like `own` from all ranks, in their order, while this rank sends what is `outgoing`."""
        parts = {rank: own if rank == self.rank else torch.empty_like(own) for rank in range(self.world_size)}
        wanted = {rank: part for rank, part in parts.items() if rank != self.rank}
        self._receive_into(wanted, {peer: _bytes_of(tensor) for peer, tensor in outgoing.items()}, timeout_s)
        return [parts[rank] for rank in range(self.world_size)]

    def _receive_into(self, wanted: Mapping[int, Tensor], outgoing: Mapping[int, Tensor], timeout_s: float) -> None:
        buffers = {peer: torch.empty(tensor.nbytes, dtype=torch.uint8) for peer, tensor in wanted.items()}
        self._exchange(outgoing, buffers, timeout_s)
        for peer, tensor in wanted.items():
            tensor.copy_(buffers[peer].view(tensor.dtype).view(tensor.shape))

    def _exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], timeout_s: float) -> None:
        """Carry bytes piece by piece, sending and receiving in turns, so that no ring need hold a whole tensor."""
        deadline_s = time.monotonic() + timeout_s
        unsent = {peer: _Progress(data, 0) for peer, data in outgoing.items()}
        wanted = {peer: _Progress(data, 0) for peer, data in incoming.items()}
        while unsent or wanted:
            unsent = _unfinished((peer, self._send_piece(peer, progress)) for peer, progress in unsent.items())
            wanted = _unfinished((peer, self._receive_piece(peer, progress, deadline_s)) for peer, progress in wanted.items())

    def _send_piece(self, peer: int, progress: "_Progress") -> "_Progress":
        data, start = progress
        # a quarter: two pieces may be in the ring, and its end may be skipped
        limit_bytes = max(self.mesh.capacity_to(peer) // 4 - HEADER_BYTES, ALIGNMENT)
        piece = data[start : start + limit_bytes]
        header = Header(Kind.TENSOR, epoch=self.epoch, source=self.rank, step=data.numel())
        self.mesh.send(peer, header, [piece])
        return _Progress(data, start + piece.numel())

    def _receive_piece(self, peer: int, progress: "_Progress", deadline_s: float) -> "_Progress":
        data, start = progress
        message = self._next_from(peer, deadline_s)
        sent_bytes, piece = message.header.step, message.tensors[0]
        try:
            if sent_bytes != data.numel():
                raise ValueError(f"rank {peer} sent a tensor of {sent_bytes} bytes, rank {self.rank} expects {data.numel()}")
            data[start : start + piece.numel()] = piece
            return _Progress(data, start + piece.numel())
        finally:
            message.release()

    def _next_from(self, peer: int, deadline_s: float) -> Message:
        while not self._arrived[peer]:
            message = self.mesh.receive()
            if message is not None and message.header.kind is Kind.TENSOR:
                self._arrived[message.header.source].append(message)
            elif message is not None:
                message.release()
                raise RuntimeError(f"a step loop uses group {self.group_name}: {message.header.kind.name} arrived")
            else:
                self._wait(peer, deadline_s)
        return self._arrived[peer].popleft()

    def _wait(self, peer: int, deadline_s: float) -> None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"rank {self.rank} of group {self.group_name} waited in vain for rank {peer}")
        self.mesh.wait(left_s)


class _Progress(NamedTuple):
    data: Tensor
    done_bytes: int


def _unfinished(items: Iterable[tuple[int, _Progress]]) -> dict[int, _Progress]:
    return {peer: progress for peer, progress in items if progress.done_bytes < progress.data.numel()}


def _tensor(tensors: Sequence[Any]) -> Tensor:
    """The one tensor of an operation, sharing the memory of an array."""
    if len(tensors) != 1:
        raise ValueError(f"tensors: {len(tensors)} given, the AFD backend takes one a call")
    return _all([tensors])[0]


def _all(tensor_lists: Sequence[Sequence[Any]]) -> list[Tensor]:
    return [torch.from_numpy(item) if isinstance(item, np.ndarray) else item for item in tensor_lists[0]]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _flat(tensors: Sequence[Any]) -> Tensor:
    return _bytes_of(_tensor(tensors))


def _combined(parts: Sequence[Tensor], operation: ReduceOp) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        if operation is ReduceOp.SUM:
            total += part
        elif operation is ReduceOp.PRODUCT:
            total *= part
        else:
            total = torch.minimum(total, part) if operation is ReduceOp.MIN else torch.maximum(total, part)
    return total


def _timeout_s(options: object) -> float:
    """Ray leaves a timeout that nobody chose at -1 ms."""
    timeout = getattr(options, "timeout_ms", timedelta(milliseconds=-1)).total_seconds()
    return timeout if timeout > 0 else DEFAULT_TIMEOUT_S
