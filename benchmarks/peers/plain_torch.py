"""Plain torch: the reference modules, one static batch, contiguous KV. What a page of code reaches.

Shapes: B requests, P prompt, T prompt and new tokens, A heads, D head_dim, H hidden, V vocab.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from afd_ray.models.checkpoint import Checkpoint, load_model
from afd_ray.models.step3 import Step3Model
from benchmarks.peers.protocol import Answer, Job, Pipe


class StaticBatch:
    """Prompts of one length, prefilled one after the other and decoded together."""

    def __init__(self, model: Step3Model, prompts: list[list[int]], max_tokens: int) -> None:
        config = model.config
        self._model, self._prompts = model, torch.tensor(prompts)  # [B, P]
        batch, self.length = self._prompts.shape
        cache = (config.num_hidden_layers, batch, self.length + max_tokens, config.head_dim)
        self._keys, self._values = (torch.zeros(cache, dtype=model.config.dtype) for _ in range(2))

    def prefill(self, index: int) -> Tensor:
        """The first token of one prompt, scalar."""
        cache: list[tuple[Tensor, Tensor]] = []
        logits = self._model(self._prompts[index], cache)  # [P, V]
        for layer, (keys, values) in enumerate(cache):
            self._keys[layer, index, : self.length] = keys
            self._values[layer, index, : self.length] = values
        return logits[-1].argmax()

    def decode(self, tokens: Tensor) -> Tensor:
        """tokens [B] at the next position to the tokens [B] after them."""
        half, position = self._model.attention, self.length
        residual = half.embed_tokens(tokens)  # [B, H]
        cos, sin = half.rotary(torch.full_like(tokens, position))
        self.length += 1
        for index in range(self._model.config.num_hidden_layers):
            layer = half.layer(index)
            q, k, v = layer.before(residual, cos, sin)
            self._keys[index, :, position], self._values[index, :, position] = k, v
            context = self._attend(index, q)
            residual, routed = layer.after(residual, context)
            residual = residual + self._model.ffn(index, routed)
        return half.logits(residual).argmax(-1)

    def _attend(self, layer: int, q: Tensor) -> Tensor:
        """q [B, A, D] over everything cached, [B, A, D]: the heads share one key head, so that they are the rows of one product."""
        keys, values = self._keys[layer, :, : self.length], self._values[layer, :, : self.length]
        return F.scaled_dot_product_attention(q[:, None], keys[:, None], values[:, None])[:, 0]


@torch.inference_mode()
def generate(model: Step3Model, job: Job) -> Answer:
    started_s = time.perf_counter()
    batch = StaticBatch(model, job.prompts, job.max_tokens)
    first, times_s = [], []
    for index in range(len(job.prompts)):
        first.append(batch.prefill(index))
        times_s.append([time.perf_counter() - started_s])
    tokens = torch.stack(first)
    for _ in range(job.max_tokens - 1):
        tokens = batch.decode(tokens)
        now_s = time.perf_counter() - started_s
        for times in times_s:
            times.append(now_s)
    return Answer(times_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    pipe = Pipe()
    torch.set_num_threads(args.threads)
    model = load_model(Checkpoint.open(args.checkpoint))
    pipe.serve(lambda job: generate(model, job))


if __name__ == "__main__":
    main()
