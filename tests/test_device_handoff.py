"""Both halves with rows that stay in device memory from one to the other: token for token the reference, however late streams are.

The device is `host_device`: kernels are interpreted on the step loop's thread, which stands for its stream, and every hand-off comes late.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.handoff.capacity import frame_bytes
from afd_ray.handoff.message import Header, Kind
from afd_ray.kernels.gpu.capture import Capture, eagerly
from afd_ray.membership.epoch import Epoch
from afd_ray.membership.experts import place_experts
from afd_ray.models.checkpoint import Checkpoint
from tests.device_group import MakeCarrier, ipc, nccl, until
from tests.gpu_cluster import CONFIG, E4M3, HERE, LATE_S, WIDE, cluster, expected, group, requests, served, written
from tests.host_device import HostDevice, stalled
from tests.triton_device import COMPILED

pytestmark = pytest.mark.skipif(COMPILED, reason="the device is one of threads")

COPIES = place_experts((5.0, 1.0, 1.0, 3.0), 2, 2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory: Path = tmp_path_factory.mktemp("tiny")
    return written(directory)


def compute(capture: Capture | None = None, *, quantise: bool = False) -> GPUCompute:
    made = None if capture is None else lambda: capture
    return GPUCompute(HERE, capture=made, stays=True, quantise_experts=quantise, quantise_rows=quantise)


@pytest.mark.parametrize("capture", [None, eagerly], ids=["launched", "replayed"])
@pytest.mark.parametrize(
    "epoch",
    [
        Epoch(1, 2, 2, 1, 2),
        Epoch(1, 1, 1, 2, 2, dispatch="routed", experts=COPIES),
        pytest.param(Epoch(1, 1, 1, 2, 1, experts=COPIES, shared_at_attention=True), marks=pytest.mark.full),
        pytest.param(Epoch(1, 1, 2, 2, 3), marks=pytest.mark.full),
    ],
    ids=["2A2F-tensor", "routed", "copies", "1A4F"],
)
def test_tokens_are_the_reference_s(checkpoint: Checkpoint, epoch: Epoch, capture: Capture | None) -> None:
    asked = requests(max_tokens=3)
    with group(epoch) as meshes, cluster(checkpoint, epoch, compute(capture), meshes=meshes) as local:
        assert served(local, asked) == expected(checkpoint, asked)


def test_so_they_are_by_nccl(checkpoint: Checkpoint) -> None:
    """What the ranks of an instance send each other passes through host memory."""
    epoch, asked = Epoch(1, 2, 2, 1, 2), requests(max_tokens=3)
    with group(epoch, nccl) as meshes, cluster(checkpoint, epoch, compute(eagerly), meshes=meshes) as local:
        assert served(local, asked) == expected(checkpoint, asked)


def test_rows_in_8_bits_are_those_that_pass_through_the_host(tmp_path: Path) -> None:
    held, epoch, asked, found = written(tmp_path, WIDE), Epoch(1, 1, 1, 1, 1), requests(prompts=(1, 5), max_tokens=2), []
    with cluster(
        held, epoch, GPUCompute(HERE, quantise_experts=True, quantise_rows=True), cache_dtype=E4M3, wire_dtype=E4M3
    ) as local:
        found.append(served(local, asked))
    with (
        group(epoch, wire=E4M3) as meshes,
        cluster(held, epoch, compute(quantise=True), cache_dtype=E4M3, wire_dtype=E4M3, meshes=meshes) as local,
    ):
        found.append(served(local, asked))
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # whatever lies where they should have come, exp may overflow
@pytest.mark.parametrize("carrier", [ipc, nccl])
def test_rows_that_never_came_make_no_token(checkpoint: Checkpoint, carrier: MakeCarrier) -> None:
    """An FFN rank tells of its rows of the last layer and is gone before they are there: they are computed again in the next epoch."""
    epoch, asked, going = Epoch(1, 1, 1, 1, 2), requests(max_tokens=6), threading.Event()
    lost: list[int] = []
    devices = [HostDevice(LATE_S) for _ in range(2)]
    with (
        group(epoch, carrier, devices=devices) as meshes,
        group(replace(epoch, number=2), carrier) as after,
        cluster(checkpoint, epoch, compute(), meshes=meshes, on_lost=lambda number, _: lost.append(number)) as local,
    ):
        send, stuck = meshes[1].send, threading.Event()

        def send_but_the_last(peer: int, header: Header, tensors: Sequence[Tensor] = ()) -> None:
            if header.kind is Kind.PARTIAL and header.layer == CONFIG.num_hidden_layers - 1 and header.step > 4:
                stalled(devices[1], going)
                stuck.set()
            send(peer, header, tensors)

        meshes[1].send = send_but_the_last  # type: ignore[method-assign]
        for request in asked:
            local.attention[0].submit(request).result(20)
        assert stuck.wait(20)
        until(lambda: carrier is nccl or devices[0].stream().waits)
        meshes[1].close()
        until(lambda: bool(lost))  # the attention rank's stream went on
        going.set()
        local.change(replace(epoch, number=2), after, drain=False)
        outputs = local.collect([request.id for request in asked])
    assert {name: [output.token_id for output in found] for name, found in outputs.items()} == expected(checkpoint, asked)
    assert set(lost) == {1}


def test_frames_fit_where_the_largest_message_goes() -> None:
    epoch, config = Epoch(1, 3, 2, 2, 2), CONFIG
    sizes = [
        [frame_bytes(epoch, rank, peer, config, torch.float32, 10) if peer in epoch.peers(rank) else 0 for peer in range(7)]
        for rank in range(7)
    ]
    assert all((size > 0) == (size >= 192 + 10 * config.hidden_size * 4) for row in sizes for size in row)
    assert sizes[3][4] >= 192 + 20 * config.hidden_size * 4, "ranks of an instance reduce rows of two attention ranks each"
    assert sizes[3][5] == 0, "of the other instance only waves come"
