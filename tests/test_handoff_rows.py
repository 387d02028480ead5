"""A layer's rows on the wire: what is exact, what is small, and how small."""

from dataclasses import replace

import pytest
import torch

from afd_ray.handoff.capacity import CONTROL_BYTES, inbound_bytes
from afd_ray.handoff.message import layout_for
from afd_ray.handoff.rows import QUANTISED, id_dtype, pack_rows, partial_dtype, partial_row_bytes, row_bytes, unpack_rows
from afd_ray.membership.epoch import Epoch
from afd_ray.models.presets import PRESETS
from afd_ray.models.step3 import Routed

WIRES = [torch.float32, torch.bfloat16, QUANTISED]


def rows_of(count: int, columns: int, dtype: torch.dtype = torch.bfloat16, experts: int = 16) -> Routed:
    generator = torch.Generator().manual_seed(5)
    choice = torch.rand(count, experts, generator=generator).topk(3, dim=-1)
    return Routed(torch.randn(count, columns, generator=generator).to(dtype), choice.indices, choice.values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wire_of_the_models_dtype_is_exact(dtype: torch.dtype) -> None:
    sent = rows_of(7, 96, dtype)
    back = unpack_rows(pack_rows(sent, dtype, torch.uint8), dtype, dtype)
    assert back.experts is not None
    assert back.weights is not None
    assert sent.weights is not None
    assert torch.equal(back.hidden, sent.hidden)
    assert torch.equal(back.weights, sent.weights)
    assert back.experts.tolist() == (sent.experts.tolist() if sent.experts is not None else None)


@pytest.mark.parametrize("wire", WIRES)
def test_a_dense_layer_sends_hidden_rows_alone(wire: torch.dtype) -> None:
    back = unpack_rows(pack_rows(Routed(torch.ones(2, 5), None, None), wire, torch.uint8), wire, torch.float32)
    assert torch.equal(back.hidden, torch.ones(2, 5))
    assert (back.experts, back.weights) == (None, None)


@pytest.mark.parametrize("columns", [256, 512, 7168])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bit_messages_are_little_more_than_half_of_16_bit_ones(columns: int, dtype: torch.dtype) -> None:
    rows = rows_of(32, columns, dtype)
    eight, sixteen = (layout_for(pack_rows(rows, wire, torch.uint8)).length_bytes for wire in (QUANTISED, torch.bfloat16))
    assert eight <= 0.53 * sixteen


def test_partial_rows_are_as_wide_as_the_wire_but_never_8_bits() -> None:
    assert [partial_dtype(wire) for wire in WIRES] == [torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(("experts", "dtype"), [(256, torch.uint8), (257, torch.int16)])
def test_expert_ids_are_as_narrow_as_their_number_allows(experts: int, dtype: torch.dtype) -> None:
    assert id_dtype(experts) is dtype
    assert torch.tensor([experts - 1]).to(dtype).item() == experts - 1


@pytest.mark.parametrize("wire", WIRES)
def test_a_buffer_holds_what_may_be_under_way(wire: torch.dtype) -> None:
    config, epoch, rows = replace(PRESETS["step3-tiny"], moe_num_experts=300), Epoch(1, 2, 2, 1, 3), 48
    routed = rows_of(rows, config.hidden_size, torch.float32, 300)
    message = layout_for(pack_rows(routed, wire, id_dtype(300))).length_bytes
    assert message <= rows * row_bytes(config, wire) + CONTROL_BYTES // 8
    assert inbound_bytes(epoch, 2, 0, config, wire, rows) >= 2 * epoch.micro_batches * message
    partial = layout_for([torch.zeros(2 * rows, config.hidden_size, dtype=partial_dtype(wire))]).length_bytes
    assert partial <= 2 * rows * partial_row_bytes(config, wire) + CONTROL_BYTES // 8
    assert inbound_bytes(epoch, 2, 3, config, wire, rows) >= 2 * epoch.micro_batches * partial
