"""The engines that can be compared, and how each is started on a checkpoint and a number of cores."""

import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import environments
from benchmarks.peers.process import Launch

KV_CACHE_GIB = 1
"""For vLLM: 524,288 tokens of step3-92m, room for every load of the benchmarks."""


def afd(checkpoint: Path, threads: int) -> Launch:
    return _here("ours", checkpoint, "--threads", str(threads))


def afd_shared(checkpoint: Path, threads: int) -> Launch:
    """With `attention.shared_expert`."""
    return _here("ours", checkpoint, "--threads", str(threads), "--shared")


def colocated(checkpoint: Path, threads: int) -> Launch:
    return _here("ours", checkpoint, "--threads", str(threads), "--colocated")


def vllm_compiled(checkpoint: Path, threads: int) -> Launch:
    return _vllm(checkpoint, threads)


def vllm_eager(checkpoint: Path, threads: int) -> Launch:
    return _vllm(checkpoint, threads, "--eager")


def torch(checkpoint: Path, threads: int) -> Launch:
    return _here("plain_torch", checkpoint, "--threads", str(threads))


ENGINES: dict[str, Callable[[Path, int], Launch]] = {
    "afd": afd,
    "afd-shared": afd_shared,
    "colocated": colocated,
    "vllm-compiled": vllm_compiled,
    "vllm-eager": vllm_eager,
    "torch": torch,
}


def vllm_environment(threads: int) -> dict[str, str]:
    """vLLM bound to the first `threads` cores, in one process: its scheduler would compete for the same cores from another."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
        "VLLM_CACHE_ROOT": str(environments.CACHE / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _vllm(checkpoint: Path, threads: int, *arguments: str) -> Launch:
    command = [str(environments.vllm()), "-m", "benchmarks.peers.vllm_cpu", "--checkpoint", str(checkpoint), *arguments]
    return Launch(command, vllm_environment(threads))


def _here(module: str, checkpoint: Path, *arguments: str) -> Launch:
    """In the project's own environment."""
    return Launch([sys.executable, "-m", f"benchmarks.peers.{module}", "--checkpoint", str(checkpoint), *arguments], {})
