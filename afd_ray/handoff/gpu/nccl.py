"""NCCL by CuPy's binding, which takes addresses and streams as they are and has `abort`; the library is the one that torch has loaded."""

import os
from array import array

import torch  # before CuPy, so that both use one libnccl
from cupy import __version__ as cupy_version
from cupy.cuda import nccl
from torch import Tensor

from afd_ray.handoff.device.nccl import Communicator
from afd_ray.handoff.device.streams import Stream
from afd_ray.handoff.gpu.cuda import CudaStream

SHARED_GPU = 23000
"""NCCL's version from which two ranks may share a GPU."""
AS_BYTES = int(cupy_version.partition(".")[0]) >= 14
"""How CuPy takes and gives a unique id; before, as a tuple of its bytes, signed."""


class CupyCommunicator:
    def __init__(self, made: nccl.NcclCommunicator, rank: int) -> None:
        self._made, self._other = made, 1 - rank

    def send(self, data: Tensor, stream: Stream) -> None:
        assert isinstance(stream, CudaStream)
        self._made.send(data.data_ptr(), data.numel(), nccl.NCCL_UINT8, self._other, stream.handle)

    def receive(self, data: Tensor, stream: Stream) -> None:
        assert isinstance(stream, CudaStream)
        self._made.recv(data.data_ptr(), data.numel(), nccl.NCCL_UINT8, self._other, stream.handle)

    def abort(self) -> None:
        self._made.abort()


class CupyNccl:
    """A `Library` for one device of this process."""

    def __init__(self, place: torch.device, *, shares_gpu: bool) -> None:
        """`shares_gpu`: a peer may be on the same GPU. RuntimeError in one line where this NCCL cannot do that."""
        version = nccl.get_version()
        if shares_gpu:
            if version < SHARED_GPU:
                raise RuntimeError(
                    f"handoff.kind: nccl with actors that share a GPU needs NCCL 2.30 or later, {version // 10000}.{version // 100 % 100} is loaded;"
                    " use ipc, or set num_gpus to 1"
                )
            os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
            os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        self._place = place

    def unique_id(self) -> bytes:
        drawn = nccl.get_unique_id()
        return drawn if isinstance(drawn, bytes) else array("b", drawn).tobytes()

    def communicator(self, unique_id: bytes, rank: int) -> Communicator:
        torch.cuda.set_device(self._place)
        try:
            made = nccl.NcclCommunicator(2, unique_id if AS_BYTES else tuple(array("b", unique_id)), rank)
        except KeyError as error:  # CuPy knows no name for NCCL's newer results: 6, a remote error; 7, in progress
            raise RuntimeError(f"NCCL's result is {error}") from None
        return CupyCommunicator(made, rank)
