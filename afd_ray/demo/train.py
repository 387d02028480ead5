"""Train the demo model from a seed: `python -m afd_ray.demo.train --seed 0 --out DIR`."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.optim import AdamW, Optimizer

from afd_ray.demo.corpus import Batch, batches
from afd_ray.demo.drills import Mix
from afd_ray.demo.forward import Losses, losses
from afd_ray.demo.muon import Muon
from afd_ray.demo.weights import CONFIG, load, save
from afd_ray.models.step3 import Step3Model

WARMUP_STEPS: Final = 50
WORKERS: Final = 2
MATRIX_LR: Final = 0.02
OTHER_LR: Final = 3e-3
WEIGHT_DECAY: Final = 0.02
BALANCE_WEIGHT: Final = 0.01
CLIP_NORM: Final = 1.0
AVERAGE_DECAY: Final = 0.98
STEPS_PER_REPORT: Final = 25


class Stage(NamedTuple):
    """Steps with one mix of drills; each stage begins from the average weights of the one before."""

    name: str
    steps: int
    examples_per_worker: int
    mix: Mix
    flat_steps: int
    """After so many the learning rate falls."""
    falling_steps: int = 1
    """After so many more it would be zero."""


EVEN: Final = {"arithmetic": 30, "counting": 12, "sorting": 10, "copying": 14, "lookup": 17, "story": 17}
HARD: Final = {"arithmetic": 22, "counting": 16, "sorting": 16, "copying": 10, "lookup": 18, "story": 18}
LAST: Final = {"arithmetic": 20, "counting": 20, "sorting": 12, "copying": 8, "lookup": 18, "story": 22}
START: Final = Mix(EVEN, drills=0.6, skills={"sum": 60, "copy": 20, "lookup": 20})
DIGITS: Final = Mix(EVEN, drills=0.6, skills={"sum": 75, "copy": 8, "lookup": 17}, short=0.5)
WORDS: Final = Mix(HARD, drills=0.4, skills={"sum": 60, "copy": 6, "lookup": 34}, short=0.3, words=0.8)
RECALL: Final = Mix(HARD, drills=0.7, skills={"sum": 35, "copy": 3, "lookup": 22, "recall": 40}, short=0.3, words=0.6)
TALLY: Final = Mix(LAST, drills=0.4, skills={"sum": 50, "copy": 2, "lookup": 18, "recall": 12, "tally": 18}, short=0.2, words=0.8)
ALL_SKILLS: Final = {"sum": 40, "copy": 2, "lookup": 8, "recall": 6, "tally": 14, "sort": 12, "tale": 18}
FINISH: Final = Mix(LAST, drills=0.45, skills=ALL_SKILLS, short=0.2, words=0.8)
ASKED: Final = Mix(
    {"arithmetic": 38, "counting": 10, "sorting": 16, "copying": 10, "lookup": 14, "story": 12},
    drills=0.25,
    skills={"sum": 70, "copy": 6, "lookup": 12, "sort": 12},
    short=0.2,
    words=0.8,
    practice=False,
)
POLISH: Final = ASKED._replace(
    shares={"arithmetic": 26, "counting": 5, "sorting": 17, "copying": 12, "lookup": 33, "story": 7},
    skills={"sum": 30, "copy": 8, "lookup": 50, "sort": 12},
)
PLAIN: Final = POLISH._replace(
    shares={"arithmetic": 18, "counting": 8, "sorting": 18, "copying": 12, "lookup": 38, "story": 6}, drills=0.15, plain=0.65
)
LOOKUPS: Final = POLISH._replace(
    shares={"arithmetic": 12, "counting": 5, "sorting": 12, "copying": 8, "lookup": 58, "story": 5},
    drills=0.2,
    skills={"sum": 30, "copy": 5, "lookup": 55, "sort": 10},
    words=1.0,
    plain=0.5,
)
STAGES: Final = (
    Stage("", 500, 96, START, flat_steps=500),
    Stage(" digits", 500, 96, DIGITS, 350, 650),
    Stage(" words", 600, 64, WORDS, 300, 1000),
    Stage(" recall", 300, 72, RECALL, 300),
    Stage(" finish", 500, 64, TALLY, 200, 700),
    Stage(" all", 500, 56, FINISH, 150, 850),
    Stage(" asked", 600, 64, ASKED, -300, 1000),
    Stage(" polish", 300, 64, POLISH, -500, 800),
    Stage(" plain", 300, 64, PLAIN, -500, 800),
    Stage(" lookups", 260, 64, LOOKUPS, -450, 750),
)

# Activations of a few MB would otherwise be mapped and zeroed by the kernel anew at every step.
ALLOCATOR: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2 << 30),
    "MALLOC_TOP_PAD_": str(1 << 28),
}


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


def rate(step: int, stage: Stage) -> float:
    """The learning rate's factor: up over the warm-up, flat, then straight down to 1%."""
    left = (stage.flat_steps + stage.falling_steps - step) / stage.falling_steps
    return min((step + 1) / WARMUP_STEPS, max(0.01, min(1.0, left)))


class Trainer:
    """One worker's copy of the model, its optimizers, and the running average of the weights that is saved."""

    def __init__(self, model: Step3Model, stage: Stage) -> None:
        self.stage, self.step = stage, 0
        self.model, self.average = model, Step3Model(CONFIG)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizers = optimizers(self.model)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def learn(self, batch: Batch) -> Losses:
        """One step on this worker's part of the batch; every worker ends with the same weights."""
        loss = losses(self.model, batch, BALANCE_WEIGHT)
        loss.total.backward()  # type: ignore[no-untyped-call]
        share_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(self.step, self.stage)
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self._follow()
        return loss

    @torch.no_grad()
    def _follow(self) -> None:
        decay = min(AVERAGE_DECAY, self.step / (self.step + 9))
        for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)


def share_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the workers."""
    gradients: list[Tensor] = []
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(
        gradients, (flat / dist.get_world_size()).split_with_sizes([g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(mean.view_as(gradient))


def begin(seed: int) -> Step3Model:
    """The untrained model of a seed."""
    model = Step3Model(CONFIG)
    initialise(model, torch.Generator().manual_seed(seed))
    return model


def run_stage(trainer: Trainer, seed: int, rank: int, out: Path, save_every: int) -> Iterator[str]:
    """One worker's part of a stage; rank 0 saves to `out`. Yields lines of progress."""
    stage, steps = trainer.stage, trainer.stage.steps
    began_s, rows = time.monotonic(), 0
    for batch in batches(f"{seed} {rank}{stage.name}", stage.mix, stage.examples_per_worker):
        loss = trainer.learn(batch)
        rows += len(batch.token_ids) * WORKERS
        if trainer.step % STEPS_PER_REPORT == 0:
            passed_s = time.monotonic() - began_s
            yield (
                f"step {trainer.step}/{steps}  answer loss {loss.answer.item():.4f}  balance {loss.balance.item():.2f}  "
                f"{rows / passed_s:,.0f} tokens/s  {passed_s / 60:.1f} min"
            )
        done = trainer.step == steps
        if rank == 0 and (done or (save_every and trainer.step % save_every == 0)):
            save(trainer.average, out)
        if done:
            return


def work(rank: int, options: argparse.Namespace, rendezvous: str) -> None:
    """The body of one worker process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORKERS)
    model = begin(options.seed) if options.stage == 0 else load(options.out).train()
    for index, stage in enumerate(STAGES[options.stage :], options.stage):
        trainer = Trainer(model, stage)
        for line in run_stage(trainer, options.seed, rank, options.out, options.save_every):
            if rank == 0:
                print(f"stage {index}  {line}", file=sys.stderr, flush=True)
        model = trainer.average
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the demo model on a corpus it generates itself, with two processes.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", type=int, default=0, choices=range(len(STAGES)), help="begin here, from the weights in DIR")
    parser.add_argument("--save-every", type=int, default=0, help="steps between saves; 0: only at the end")
    options = parser.parse_args()
    os.environ.update(ALLOCATOR)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit ends the workers, the signal's default would not
    with tempfile.TemporaryDirectory() as directory:
        spawn(work, args=(options, f"{directory}/rendezvous"), nprocs=WORKERS, daemon=True)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
