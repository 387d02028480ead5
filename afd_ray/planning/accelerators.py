"""An accelerator by its peaks and its price."""

from typing import NamedTuple

from afd_ray.planning.shapes import Record

SERVER = 8
"""Accelerators of one server: the paper's instance."""


class Figure(NamedTuple):
    """A number and where it comes from: a key of the catalogue's sources."""

    value: float
    source: str


class Accelerator(Record):
    """Figures as data sheets print them, rates as properties in FLOP/s and bytes/s."""

    name: str
    ray_type: str
    """What Ray labels its nodes with: `ray.io/accelerator-type`."""
    usd_per_hour: Figure
    bf16_tflops: Figure
    fp8_tflops: Figure | None = None
    memory_tb_s: Figure
    memory_gb: Figure
    link_gb_s: Figure
    """To the others of its server, each way."""
    nic_gbit_s: Figure
    """To other servers, each way."""

    @property
    def bf16_flops(self) -> float:
        return self.bf16_tflops.value * 1e12

    @property
    def flops(self) -> float:
        """Of 8-bit products; bf16's where there are none: weights are widened then, and the bytes stay."""
        return self.fp8_tflops.value * 1e12 if self.fp8_tflops else self.bf16_flops

    @property
    def memory_bytes(self) -> float:
        return self.memory_gb.value * 1e9

    @property
    def memory_bytes_s(self) -> float:
        return self.memory_tb_s.value * 1e12

    @property
    def link_bytes_s(self) -> float:
        return self.link_gb_s.value * 1e9

    @property
    def nic_bytes_s(self) -> float:
        return self.nic_gbit_s.value * 1e9 / 8

    @property
    def usd_per_s(self) -> float:
        return self.usd_per_hour.value / 3600

    @property
    def usd_per_flop(self) -> float:
        return self.usd_per_s / self.flops

    @property
    def usd_per_byte(self) -> float:
        """Moved to or from memory."""
        return self.usd_per_s / self.memory_bytes_s

    def at_price(self, usd_per_hour: float) -> "Accelerator":
        return self.model_copy(update={"usd_per_hour": Figure(usd_per_hour, "given")})


class Achieved(Record):
    """What is reached of the peaks, from 0 to 1."""

    attention: Figure
    """Of attention's roofline, projections included."""
    gemm: Figure
    """Of the roofline of grouped products."""
    link: Figure
    network: Figure
