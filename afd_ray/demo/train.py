"""Train the demo model from a seed: `python -m afd_ray.demo.train --seed 0 --out DIR`."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from afd_ray.demo.corpus import batches
from afd_ray.demo.forward import losses
from afd_ray.demo.muon import Muon
from afd_ray.demo.weights import CONFIG, save
from afd_ray.models.step3 import Step3Model

STEPS: Final = 2200
WARMUP_STEPS: Final = 50
EXAMPLES_PER_BATCH: Final = 112
MATRIX_LR: Final = 0.02
OTHER_LR: Final = 3e-3
WEIGHT_DECAY: Final = 0.02
BALANCE_WEIGHT: Final = 0.01
CLIP_NORM: Final = 1.0
AVERAGE_DECAY: Final = 0.98


def initialise(model: Step3Model, generator: torch.Generator) -> None:
    """Matrices scaled by their fan-in, those that write to the residual smaller; norms 1."""
    writes = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
            continue
        std = 0.5 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
        scale = writes if "o_proj" in name or "down_proj" in name else 0.1 if "lm_head" in name else 1.0
        nn.init.normal_(parameter, std=std * scale, generator=generator)


def optimizers(model: Step3Model) -> list[Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head, routers and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim >= 2 and ".layers." in name and ".gate.weight" not in name
        (matrices if inside else others).append(parameter)
    return [
        Muon(matrices, lr=MATRIX_LR, weight_decay=WEIGHT_DECAY),
        AdamW(others, lr=OTHER_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int) -> float:
    """The learning rate's factor: up over the warm-up, flat to 40%, then straight down to 1%."""
    left = (steps - step) / (0.6 * steps)
    return min((step + 1) / WARMUP_STEPS, max(0.01, min(1.0, left)))


def train(seed: int, steps: int, out: Path, save_every: int) -> Iterator[str]:
    """Train and save to `out`; yields a line of progress now and then."""
    torch.manual_seed(seed)
    model = Step3Model(CONFIG)
    initialise(model, torch.Generator().manual_seed(seed))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    tuned = optimizers(model)
    base = [optimizer.param_groups[0]["lr"] for optimizer in tuned]
    began_s, rows = time.monotonic(), 0
    for step, batch in zip(range(steps), batches(seed, EXAMPLES_PER_BATCH), strict=False):
        for optimizer, lr in zip(tuned, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate(step, steps)
        loss = losses(model, batch, BALANCE_WEIGHT)
        loss.total.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for optimizer in tuned:
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(model)
        rows += len(batch.token_ids)
        if step % 50 == 49:
            passed_s = time.monotonic() - began_s
            yield (
                f"step {step + 1}/{steps}  answer loss {loss.answer.item():.4f}  balance {loss.balance.item():.2f}  "
                f"{rows / passed_s:,.0f} tokens/s  {passed_s / 60:.1f} min"
            )
        if save_every and step % save_every == save_every - 1:
            save(average.module, out)
    save(average.module, out)
    yield f"saved {out}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo model on a corpus it generates itself.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=0, help="steps between saves; 0: only at the end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for line in train(options.seed, options.steps, options.out, options.save_every):
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
