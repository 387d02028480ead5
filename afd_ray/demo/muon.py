"""Momentum with orthogonalised updates for weight matrices (Jordan et al. 2024, "Muon"): learns the demo in fewer steps than AdamW."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(x: Tensor) -> Tensor:
    """The nearest matrices with singular values around 1, by Newton-Schulz iteration: x [B, M, N]."""
    a, b, c = QUINTIC
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised matrix by matrix; a parameter [E, M, N] counts as E matrices."""

    def __init__(self, parameters: Iterable[Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(list(parameters), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Parameter]] = {}
            for parameter in group["params"]:
                rows, columns = parameter.shape[-2:]
                by_shape.setdefault((rows, columns), []).append(parameter)
            for shape, parameters in by_shape.items():
                self._update(group, shape, parameters)

    def _update(self, group: dict[str, float], shape: tuple[int, int], parameters: list[Parameter]) -> None:
        updates = [self._momentum(parameter, group["momentum"]).reshape(-1, *shape) for parameter in parameters]
        steps = orthogonalised(torch.cat(updates)).split_with_sizes([len(update) for update in updates])
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        for parameter, step in zip(parameters, steps, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step.view_as(parameter), alpha=scale)

    def _momentum(self, parameter: Parameter, momentum: float) -> Tensor:
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: Tensor = state["velocity"]
        velocity.lerp_(gradient, 1 - momentum)
        return gradient.lerp(velocity, momentum)
