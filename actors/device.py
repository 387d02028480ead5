"""Which device an actor computes on and hands over from: the one place that may load the GPU's part, for without a GPU none of it need be installed."""

import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

import torch

from afd_ray.engine.compute import Compute, HostCompute
from afd_ray.handoff.device.carrier import Carrier
from afd_ray.handoff.device.ipc import IpcCarrier
from afd_ray.handoff.device.nccl import NcclCarrier
from afd_ray.handoff.device.streams import Device
from afd_ray.handoff.terms import DeviceLinkKind


def compute_for(role: str, num_gpus: float, *, graphs: bool = False, stays: bool = False, **quantise: bool) -> Compute:
    """What `num_gpus` of that role's configuration asks for; raises RuntimeError in one line where this actor cannot have it.

    `quantise_...`, `stays`: as `GPUCompute` takes them. `graphs`: steps that decode are captured. A CPU needs none of these.
    """
    if not num_gpus:
        return HostCompute()
    asked = f"{role}.num_gpus: {num_gpus:g}"
    if not torch.cuda.is_available():
        raise RuntimeError(f"{asked} needs a CUDA GPU, and torch {torch.__version__} finds none in this actor's process")
    if not is_installed("triton"):
        raise RuntimeError(f"{asked} needs Triton, which is not installed here (extras cuda12 and cuda13 have it)")
    from afd_ray.engine.gpu.compute import GPUCompute

    return GPUCompute.of_first_gpu(num_gpus, graphs=graphs, stays=stays, **quantise)


LINGER_S = 1.0
"""From the end of an epoch until NCCL lets an FFN rank's streams go: for attention ranks to notice that its links are closed."""


class DeviceLinks(NamedTuple):
    """What a group needs for rows that stay on the GPU."""

    carrier: Carrier
    device: Device


def links_for(
    kind: DeviceLinkKind, rank: int, peers: Mapping[int, int], places: int, *, shares_gpu: bool, lingers: bool
) -> DeviceLinks:
    """`peers`: the longest frame in bytes from each; raises RuntimeError in one line where this actor cannot have such links.

    `shares_gpu`: actors may be on one GPU. `lingers`: it is an FFN rank.
    """
    _require("cuda.bindings", "cuda-bindings", kind)
    from afd_ray.handoff.gpu.cuda import CudaDevice

    place = torch.device("cuda", 0)
    device = CudaDevice(place)
    if kind == "ipc":
        return DeviceLinks(IpcCarrier(device, peers, places), device)
    _require("cupy", "CuPy", kind)
    from afd_ray.handoff.gpu.nccl import CupyNccl

    library = CupyNccl(place, shares_gpu=shares_gpu)
    return DeviceLinks(NcclCarrier(device, rank, peers, places, library, LINGER_S if lingers else 0.0), device)


def is_installed(module: str) -> bool:
    """Without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def _require(module: str, name: str, kind: str) -> None:
    if not is_installed(module):
        raise RuntimeError(f"handoff.kind: {kind} needs {name}, which is not installed here (extras cuda12 and cuda13 have it)")
