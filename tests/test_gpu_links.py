"""What links between GPUs call, as far as that can be looked at without one."""

import importlib.util
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch

from actors.device import links_for
from afd_ray.config import parse_config
from afd_ray.engine.gpu.compute import GPUCompute
from afd_ray.handoff.terms import DeviceLinkKind
from afd_ray.models.presets import PRESETS

HAS_CUDA_BINDINGS = importlib.util.find_spec("cuda") is not None


@pytest.mark.skipif(HAS_CUDA_BINDINGS, reason="cuda-bindings is installed here")
@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_what_is_not_installed_is_named_in_one_line(kind: DeviceLinkKind) -> None:
    with pytest.raises(
        RuntimeError, match=rf"^handoff\.kind: {kind} needs cuda-bindings, which is not installed .* cuda13"
    ) as error:
        links_for(kind, 0, {1: 4096}, 4, shares_gpu=True, lingers=False)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not HAS_CUDA_BINDINGS or torch.cuda.is_available(), reason="wants cuda-bindings, and no driver")
def test_the_driver_s_functions_take_what_they_are_given() -> None:
    """Without a driver they come as far as looking for it."""
    from cuda.bindings import driver

    handle = driver.CUipcMemHandle()
    handle.reserved = bytes(range(64))
    assert bytes(handle.reserved) == bytes(range(64))
    flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
    wait = int(driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
    calls = [
        (driver.cuStreamWriteValue32, 0, 4096, 5, 0),
        (driver.cuStreamWaitValue32, 0, 4096, 5, wait),
        (driver.cuMemAlloc, 256),
        (driver.cuMemFree, 4096),
        (driver.cuIpcGetMemHandle, 4096),
        (driver.cuIpcOpenMemHandle, handle, int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)),
        (driver.cuIpcCloseMemHandle, 4096),
        (driver.cuMemHostRegister, 4096, 4096, flags),
        (driver.cuMemHostGetDevicePointer, 4096, 0),
        (driver.cuMemHostUnregister, 4096),
    ]
    for function, *arguments in calls:
        with pytest.raises(RuntimeError, match="libcuda"):
            function(*arguments)


def test_a_thread_has_the_device_s_context_before_it_orders_a_stream_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread whose first call is the driver's has none, and torch's guards make none of device 0."""
    entered, called = [], []

    def ordered(*arguments: object) -> tuple[int]:
        called.append((threading.get_ident(), arguments))
        return (0,)

    waits = SimpleNamespace(CU_STREAM_WAIT_VALUE_GEQ=0)
    driver = SimpleNamespace(
        cuStreamWaitValue32=ordered,
        cuStreamWriteValue32=ordered,
        CUstreamWaitValue_flags=waits,
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
    )
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.delitem(sys.modules, "afd_ray.handoff.gpu.cuda", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: entered.append((threading.get_ident(), len(called))))
    cuda = importlib.import_module("afd_ray.handoff.gpu.cuda")
    monkeypatch.delitem(sys.modules, "afd_ray.handoff.gpu.cuda")
    stream = cuda.CudaStream(SimpleNamespace(cuda_stream=7, device=torch.device("cuda", 0)))

    def order() -> None:
        stream.wait(4096, 1)
        stream.write(4100, 2)

    thread = threading.Thread(target=order)
    thread.start()
    ident = thread.ident
    thread.join()
    assert entered == [(ident, 0)]
    assert called == [(ident, (7, 4096, 1, 0)), (ident, (7, 4100, 2, 0))]
    order()
    assert entered[1:] == [(threading.get_ident(), 2)]


@pytest.mark.parametrize("version", ["13.6.0", "14.2.0"])
def test_a_unique_id_is_what_this_cupy_takes_for_one(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes from 14 on, before a tuple of signed ones; between members it is bytes."""
    drawn, taken = bytes(range(200, 256)) + bytes(72), []
    given = drawn if version.startswith("14") else tuple(byte - 256 if byte > 127 else byte for byte in drawn)

    def communicator(ranks: int, unique_id: object, rank: int) -> object:
        taken.append((ranks, unique_id, rank))
        if rank:
            raise KeyError(6)
        return object()

    nccl = SimpleNamespace(get_version=lambda: 22809, get_unique_id=lambda: given, NcclCommunicator=communicator)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, module in {
        "cupy": SimpleNamespace(__version__=version),
        "cupy.cuda": SimpleNamespace(nccl=nccl),
        "cuda": ModuleType("cuda"),
        "cuda.bindings": SimpleNamespace(driver=None),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("afd_ray.handoff.gpu.cuda", "afd_ray.handoff.gpu.nccl"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    library = importlib.import_module("afd_ray.handoff.gpu.nccl").CupyNccl(torch.device("cuda", 0), shares_gpu=False)
    for name in ("afd_ray.handoff.gpu.cuda", "afd_ray.handoff.gpu.nccl"):
        monkeypatch.delitem(sys.modules, name)
    assert library.unique_id() == drawn
    library.communicator(drawn, 0)
    assert taken == [(2, given, 0)]
    with pytest.raises(RuntimeError, match="NCCL's result is 6"):
        library.communicator(drawn, 1)


def test_rows_under_way_take_room_from_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from actors.attention import build_cache

    model, blocks = PRESETS["step3-tiny"], {}
    monkeypatch.setattr(GPUCompute, "cache_bytes", lambda *arguments: 64 << 20)
    for kind in ("auto", "ipc", "nccl"):
        asked = {
            "attention": {"num_gpus": 1},
            "ffn": {"num_gpus": 1},
            "handoff": {"kind": kind},
            "pipeline": {"max_running_requests": 9999},
        }
        blocks[kind] = build_cache(parse_config(asked), model, GPUCompute(torch.device("cpu")))[1].total
    assert blocks["auto"] > blocks["ipc"] > blocks["nccl"] > 0
