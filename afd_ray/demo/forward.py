"""The reference's modules over a whole training batch: the same mathematics, with every example of a group attended at once.

N rows, H hidden, A heads, D head_dim, E experts, K top-k.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_ray.demo.corpus import Batch, Group
from afd_ray.models.step3 import Experts, Routed, Step3Model, swiglu


class Losses(NamedTuple):
    """What training minimises, and what it shows."""

    total: Tensor
    answer: Tensor
    balance: Tensor


def attend_groups(q: Tensor, k: Tensor, v: Tensor, groups: list[Group]) -> Tensor:
    """Causal attention inside every example: q [N, A, D], k and v [N, D] to [N, A, D]; padding comes after what it could harm."""
    _, heads, dim = q.shape
    sizes = [group.examples * group.length for group in groups]
    out = []
    for group, qg, kg, vg in zip(
        groups, q.split_with_sizes(sizes), k.split_with_sizes(sizes), v.split_with_sizes(sizes), strict=True
    ):
        shape = (group.examples, group.length, -1, dim)
        query = qg.view(shape).transpose(1, 2)  # [B, A, T, D]
        key, value = (x.reshape(shape).transpose(1, 2).expand(-1, heads, -1, -1) for x in (kg, vg))
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out.append(context.transpose(1, 2).reshape(-1, heads, dim))
    return torch.cat(out)


def run_experts(experts: Experts, routed: Routed) -> Tensor:
    """The weighted sum [N, H] of the chosen experts, with the rows sorted by expert once."""
    assert routed.experts is not None
    assert routed.weights is not None
    top_k = routed.experts.shape[1]
    order = routed.experts.flatten().argsort(stable=True)
    counts = routed.experts.flatten().bincount(minlength=experts.gate_proj.shape[0]).tolist()
    rows = order // top_k
    parts = routed.hidden.index_select(0, rows).split_with_sizes(counts)
    weights = zip(experts.gate_proj, experts.up_proj, experts.down_proj, strict=True)
    y = torch.cat([swiglu(x, gate, up, down) for x, (gate, up, down) in zip(parts, weights, strict=True)])
    y = y * routed.weights.flatten()[order, None]
    return torch.zeros_like(routed.hidden).index_add(0, rows, y)


def imbalance(probabilities: Tensor, experts: Tensor) -> Tensor:
    """1 when the experts share the rows evenly, up to E when one takes all: probabilities [N, E], experts [N, K]."""
    total = probabilities.shape[1]
    share = experts.flatten().bincount(minlength=total).float() / experts.numel()
    return total * (share * probabilities.mean(0)).sum()


def losses(model: Step3Model, batch: Batch, balance_weight: float) -> Losses:
    """Cross entropy of the answers, and the routers' imbalance."""
    attention = model.attention
    residual = attention.embed_tokens(batch.token_ids)
    cos, sin = attention.rotary(batch.positions)
    balance = torch.zeros(())
    layers: list[tuple[Any, Any]] = list(zip(attention.layers, model.ffn.layers, strict=True))
    for layer, ffn in layers:
        q, k, v = layer.before(residual, cos, sin)
        context = attend_groups(q, k, v, batch.groups)
        if layer is attention.layers[-1]:
            residual, context = residual[batch.is_answer], context[batch.is_answer]  # no other row is predicted from
        residual, routed = layer.after(residual, context)
        if routed.experts is None:
            residual = residual + ffn.mlp(routed.hidden)
            continue
        balance = balance + imbalance(layer.moe["gate"](routed.hidden).softmax(-1), routed.experts)
        residual = residual + run_experts(ffn.moe, routed) + ffn.share_expert(routed.hidden)
    answer = F.cross_entropy(attention.logits(residual), batch.targets[batch.is_answer])
    return Losses(answer + balance_weight * balance, answer, balance)
