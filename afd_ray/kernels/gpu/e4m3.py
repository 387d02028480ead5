"""Scales of e4m3 blocks inside kernels, by the rule of `handoff.quantise`: powers of two, as a byte each."""

import triton
import triton.language as tl


@triton.jit
def scale_exponent(peak):
    """The byte of the smallest power of two, from 2^-126 on, that brings float32 peaks within 448."""
    return tl.maximum(((peak.to(tl.int32, bitcast=True) - 0x600001) >> 23) - 7, 1)


@triton.jit
def power_of_two(exponent):
    """2^(e - 127) in float32 of int32 bytes from 1 to 254."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def to_e4m3(scaled):
    """Rounded to nearest. What is not finite becomes nan, as in torch; the GPU's own conversion would make the largest value of infinity."""
    return tl.where(tl.abs(scaled) <= 448.0, scaled, float("nan")).to(tl.float8e4nv)


@triton.jit
def quantised(blocks):
    """float32 [B, BLOCK] to e4m3 [B, BLOCK] and exponents [B] uint8."""
    exponent = scale_exponent(tl.max(tl.abs(blocks), 1))
    return to_e4m3(blocks * power_of_two(254 - exponent)[:, None]), exponent.to(tl.uint8)
