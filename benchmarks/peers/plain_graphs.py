"""Plain torch with CUDA graphs: the reference's weights, one static batch, a decode step captured once. What two pages of code reach.

Every expert computes every row, and weights of 0 leave out what a row did not choose: few rows read all weights anyway, and nothing depends on
what was chosen, as a graph wants it.

Shapes: B requests, P prompt, T prompt and new tokens, A heads, D head_dim, H hidden, E experts, V vocab.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_ray.kernels.gpu.capture import Capture
from afd_ray.models.step3 import Experts, FFNLayer, Step3Model, swiglu


class CapturedBatch:
    """Prompts of one length, prefilled one after the other by the reference and decoded together."""

    def __init__(self, model: Step3Model, prompts: Tensor, max_tokens: int, capture: Capture) -> None:
        """prompts [B, P]."""
        config = model.config
        self._model, self._prompts = model, prompts
        batch, length = prompts.shape
        cache = (config.num_hidden_layers, batch, length + max_tokens, config.head_dim)
        with prompts.device:
            self._keys, self._values = (torch.zeros(cache, dtype=config.dtype) for _ in range(2))
            self._position, self.tokens = torch.full((1,), length), torch.zeros(batch, dtype=torch.int64)
            self._places = torch.arange(cache[2])
        self._step = capture(self._decode)

    def prefill(self) -> None:
        """Leaves the first tokens in `tokens` [B]."""
        length = self._prompts.shape[1]
        self._position.fill_(length)
        for index, prompt in enumerate(self._prompts):
            cache: list[tuple[Tensor, Tensor]] = []
            self.tokens[index] = self._model(prompt, cache)[-1].argmax()
            for layer, (keys, values) in enumerate(cache):
                self._keys[layer, index, :length] = keys
                self._values[layer, index, :length] = values

    def decode(self) -> None:
        """The next tokens in place of the last."""
        self._step()

    def _decode(self) -> None:
        half = self._model.attention
        residual = half.embed_tokens(self.tokens)  # [B, H]
        cos, sin = half.rotary(self._position)
        seen = (self._places <= self._position)[None]  # [1, T]
        for index, ffn in enumerate(self._model.ffn.layers):
            layer = half.layer(index)
            q, k, v = layer.before(residual, cos, sin)
            keys, values = self._keys[index], self._values[index]
            keys.index_copy_(1, self._position, k[:, None])
            values.index_copy_(1, self._position, v[:, None])
            context = F.scaled_dot_product_attention(q[:, None], keys[:, None], values[:, None], attn_mask=seen)[:, 0]
            residual, routed = layer.after(residual, context)
            assert isinstance(ffn, FFNLayer)
            residual = residual + _feed(ffn, routed.hidden, routed.experts, routed.weights)
        self.tokens.copy_(half.logits(residual).argmax(-1))
        self._position.add_(1)


def _feed(layer: FFNLayer, hidden: Tensor, ids: Tensor | None, weights: Tensor | None) -> Tensor:
    if layer.moe is None or ids is None or weights is None:
        dense: Tensor = layer(hidden, ids, weights)
        return dense
    assert layer.share_expert is not None
    total: Tensor = layer.share_expert(hidden)
    return total + _all_experts(layer.moe, hidden, ids, weights)


def _all_experts(moe: Experts, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    shares = hidden.new_zeros(len(hidden), len(moe.gate_proj)).scatter_(1, ids, weights)  # [B, E]
    total = torch.zeros_like(hidden)
    for expert, (gate, up, down) in enumerate(zip(moe.gate_proj, moe.up_proj, moe.down_proj, strict=True)):
        total += swiglu(hidden, gate, up, down) * shares[:, expert, None]
    return total
