"""What this host has for actors on GPUs, seen without a CUDA context: the process that looks need not have been given a GPU."""

import ctypes
from importlib import metadata
from typing import NamedTuple

import torch

from actors.device import is_installed
from afd_ray.diagnosis.facts import DeviceFacts

WANTED = ("triton", "cuda.bindings", "cupy")
NVML = "libnvidia-ml.so.1"


class Seen(NamedTuple):
    """What NVIDIA's management library tells, which does not look at CUDA_VISIBLE_DEVICES."""

    gpus: int
    driver: str | None
    error: str | None


def device_facts() -> DeviceFacts:
    gpus, driver, error = seen_gpus()
    missing = frozenset(module for module in WANTED if not is_installed(module))
    return DeviceFacts(gpus, error, driver, torch.version.cuda, nccl_version(), missing)


def seen_gpus() -> Seen:
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return Seen(0, None, f"no NVIDIA driver there ({NVML} is missing)")
    code = nvml.nvmlInit_v2()
    if code:
        return Seen(0, None, f"the NVIDIA driver does not answer (NVML's error {code})")
    count, driver = ctypes.c_uint(0), ctypes.create_string_buffer(96)
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlSystemGetDriverVersion(driver, len(driver))
    nvml.nvmlShutdown()
    return Seen(count.value, driver.value.decode() or None, None if count.value else "the NVIDIA driver finds none there")


def nccl_version() -> str | None:
    """Of the library that torch has loaded, or else of an installed package."""
    if torch.version.cuda is not None and hasattr(torch._C, "_nccl_version"):
        return ".".join(str(part) for part in torch.cuda.nccl.version()[:3])
    major = (torch.version.cuda or "").partition(".")[0]
    for package in (f"nvidia-nccl-cu{major}", "nvidia-nccl-cu13", "nvidia-nccl-cu12"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
