"""Frames carry what was packed, and refuse what is not of this contract."""

import random

import pytest
import torch

from afd_ray.handoff.message import (
    ALIGNMENT,
    HEADER_BYTES,
    Header,
    Kind,
    Layout,
    layout_for,
    layout_from,
    layout_of,
    length_of,
    pack_into,
    unpack_from,
)
from tests.strangers import damaged

DIGEST = 0x0123456789ABCDEF
HEADER = Header(Kind.DISPATCH, epoch=7, source=3, slot=2, layer=60, step=1 << 40, rows=17, first_row=5)


def pack(header: Header, layout: Layout, digest: int) -> bytearray:
    frame = bytearray(HEADER_BYTES)
    pack_into(frame, 0, header, layout, digest)
    return frame


def read(frame: bytearray) -> tuple[Header, Layout]:
    prefix, header = unpack_from(frame, 0, DIGEST)
    return header, layout_from(prefix)


def test_header_and_layout_survive_the_wire() -> None:
    tensors = [torch.zeros(17, 512, dtype=torch.bfloat16), torch.zeros(0, 3, dtype=torch.int16), torch.tensor(1.0)]
    layout = layout_for(tensors)
    assert read(pack(HEADER, layout, DIGEST)) == (HEADER, layout)
    assert [(field.dtype, field.shape) for field in layout.fields] == [
        (torch.bfloat16, (17, 512)),
        (torch.int16, (0, 3)),
        (torch.float32, ()),
    ]
    assert all(field.offset_bytes % ALIGNMENT == 0 for field in layout.fields)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_every_dtype_has_a_code(dtype: torch.dtype) -> None:
    layout = layout_of(((dtype, (4, 3)),))
    assert read(pack(HEADER, layout, DIGEST))[1].fields[0].dtype == dtype


@pytest.mark.parametrize(
    ("offset", "byte", "reason"),
    [
        (0, 0, "frame magic is"),
        (4, 9, "wire version is 9, this side speaks 4"),
        (6, 5, "announces 5 tensors"),
        (8, 64, "frame length is 320 bytes, its tensors need 256"),
        (16, 200, "dtype code 200"),
        (17, 9, "with 9 dimensions"),
        (88, 0, "contract digest is 0123456789abcd00, this side has 0123456789abcdef"),
        (96, 99, "message kind is 99"),
    ],
)
def test_a_damaged_frame_is_refused_in_one_line(offset: int, byte: int, reason: str) -> None:
    wire = pack(HEADER, layout_of(((torch.uint8, (64,)),)), DIGEST)
    wire[offset] = byte
    with pytest.raises(ValueError, match=reason) as caught:
        read(wire)
    assert "\n" not in str(caught.value)


def test_ten_thousand_damaged_frames_are_refused_or_whole() -> None:
    rng = random.Random(0)
    right = bytes(pack(HEADER, layout_of(((torch.uint8, (64,)), (torch.float32, (2, 3)))), DIGEST))
    refusals: list[str] = []
    for _ in range(10_000):
        wire = bytearray(damaged(rng, right))
        try:
            length_bytes = length_of(memoryview(wire), 0, 1 << 20)
            _, layout = read(wire)
        except ValueError as error:
            refusals.append(str(error))
        else:
            assert layout.length_bytes == length_bytes <= 1 << 20
    assert 0 < len(refusals) < 10_000
    assert not any("\n" in refusal for refusal in refusals)


def test_what_no_frame_can_carry_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"torch\.float64 cannot travel"):
        layout_for([torch.zeros(1, dtype=torch.float64)])
    with pytest.raises(ValueError, match="5 in one message, at most 4"):
        layout_for([torch.zeros(1)] * 5)
    with pytest.raises(ValueError, match="in one message, at most 281474976710656 are allowed"):
        layout_of(((torch.uint8, (1 << 31, 1 << 31)),))
    with pytest.raises(ValueError, match="at most 4 dimensions"):
        layout_for([torch.zeros(1, 1, 1, 1, 1)])
    with pytest.raises(ValueError, match="cannot travel"):
        pack(Header(Kind.STEP, epoch=0, source=0, rows=-1), layout_of(()), DIGEST)
