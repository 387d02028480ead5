"""A half for another shard: what is held already is taken over, packed or not, and only the rest is read."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from afd_ray.kernels.packed import PACKED_STACKS, PackedFFNLayer, packed_weights
from afd_ray.kernels.quantised import QUANTISED_STACKS, QuantisedDense, QuantisedExperts, quantise_dense, quantise_experts
from afd_ray.models.layout import STACKED_EXPERTS, Unallocated
from afd_ray.models.step3 import FFNHalf, FFNLayer, FFNShard

_STACKS = frozenset((*STACKED_EXPERTS, *PACKED_STACKS, *QUANTISED_STACKS))
"""Names, within a layer, of tensors whose first dimension counts the experts held."""


class Lack(NamedTuple):
    """What has to be read by a rank that holds one shard and shall hold another."""

    experts: tuple[int, ...]
    dense: bool
    """Whether the slices of shared experts and dense layers have to be."""


def lack(held: FFNShard, wanted: FFNShard) -> Lack:
    """An expert is taken over when the same slice of it is held."""
    kept = set(held.experts) if held.routed == wanted.routed else set()
    return Lack(tuple(expert for expert in wanted.experts if expert not in kept), held.dense != wanted.dense)


Read = Callable[[FFNShard, bool], FFNHalf]
"""Gives a plain half with this shard's experts, and with its slices of all else only where asked for."""


def regather(held: FFNHalf, wanted: FFNShard, read: Read) -> FFNHalf:
    """The half of `wanted`, packed or quantised if `held` is. It shares what is equal with `held`, which may be served meanwhile."""
    missing = lack(held.shard, wanted)
    fresh = read(wanted._replace(experts=missing.experts), missing.dense)
    with Unallocated():
        half = FFNHalf(held.config, wanted)
    for index, layer in enumerate(half.layers):
        assert isinstance(layer, FFNLayer)
        _quantise_as(held.layers[index], layer, fresh.layers[index])
        weights = _Join(held.shard, missing, wanted)(held.layers[index], fresh.layers[index])
        if isinstance(held.layers[index], PackedFFNLayer):
            half.layers[index] = PackedFFNLayer(layer, weights)
        else:
            layer.load_state_dict(weights, assign=True)
    half.requires_grad_(False).eval()
    return half


def _quantise_as(held: nn.Module, layer: FFNLayer, fresh: nn.Module) -> None:
    """What is to be loaded and what is read, if what is held is quantised."""
    assert isinstance(fresh, FFNLayer)
    if isinstance(getattr(held, "moe", None), QuantisedExperts):
        assert layer.moe is not None
        count, inner, hidden = layer.moe.gate_proj.shape
        with Unallocated():
            layer.moe = QuantisedExperts(count, hidden, inner)
        quantise_experts(fresh)
    for name in ("share_expert", "mlp"):
        if isinstance(getattr(held, name, None), QuantisedDense):
            inner, hidden = getattr(layer, name).gate_proj.weight.shape
            with Unallocated():
                setattr(layer, name, QuantisedDense(hidden, inner))
            if not any(parameter.is_meta for parameter in getattr(fresh, name).parameters()):
                quantise_dense(fresh)


class _Join:
    """Puts one layer's tensors together from those held and those read."""

    def __init__(self, held: FFNShard, missing: Lack, wanted: FFNShard) -> None:
        self._dense = missing.dense
        self._all_held = not missing.experts and held.experts == wanted.experts
        places = {expert: (False, row) for row, expert in enumerate(held.experts)}
        places |= {expert: (True, row) for row, expert in enumerate(missing.experts)}
        self._sources = [places[expert] for expert in wanted.experts]

    def __call__(self, held: nn.Module, fresh: nn.Module) -> dict[str, Tensor]:
        kept = _allocated(held)
        assert isinstance(fresh, FFNLayer)
        read = packed_weights(fresh) if isinstance(held, PackedFFNLayer) else _allocated(fresh)
        return {name: self._tensor(name, tensor, read.get(name)) for name, tensor in kept.items()}

    def _tensor(self, name: str, held: Tensor, fresh: Tensor | None) -> Tensor:
        if name not in _STACKS:
            if not self._dense:
                return held
            assert fresh is not None
            return fresh
        if self._all_held:
            return held
        return self._stack(held, fresh)

    def _stack(self, held: Tensor, fresh: Tensor | None) -> Tensor:
        shape = (held if fresh is None else fresh).shape[1:]
        out = torch.empty(len(self._sources), *shape, dtype=held.dtype, device=held.device)
        for row, (is_fresh, source) in enumerate(self._sources):
            tensor = fresh if is_fresh else held
            assert tensor is not None
            out[row] = tensor[source]
        return out


def _allocated(layer: nn.Module) -> Mapping[str, Tensor]:
    return {name: parameter for name, parameter in layer.named_parameters() if not parameter.is_meta}
