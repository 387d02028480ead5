"""What members are told of an epoch: its shape as configured, and which experts each instance holds in it."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from afd_ray.config import Config
from afd_ray.membership.epoch import Epoch
from afd_ray.membership.events import Roster
from afd_ray.membership.experts import ExpertMap, spread_experts
from afd_ray.membership.shape import Shape
from afd_ray.models.config import ModelConfig


def epoch_of(config: Config, model: ModelConfig, shape: Shape, number: int, loads: Sequence[int] = ()) -> Epoch:
    """An epoch of this shape as configured; `loads`: how often each expert was chosen, empty where that is not known.

    A smaller shape has room for fewer copies of experts than configured.
    """
    ffn = config.ffn
    redundant = min(ffn.redundant_experts, max(0, model.moe_num_experts * (shape.expert_parallel - 1)))
    epoch = shape.epoch(number).with_experts(model, ffn.dispatch, redundant, loads)
    return replace(epoch, shared_at_attention=config.attention.shared_expert)


def kept_experts(base: Roster, experts: ExpertMap, roster: Roster) -> ExpertMap:
    """For each instance of a roster the experts that all its ranks have in the base, whose instances hold `experts`; none where ranks are new.

    >>> shape = Shape(1, 1, 3, None)
    >>> base = Roster(1, shape, ("a",), ("f", "g", "h"))
    >>> kept_experts(base, ((0, 1), (2, 3), (4, 5)), Roster(2, shape, ("a",), ("f", "h", "i")))
    ((0, 1), (4, 5), ())
    """
    held = dict(zip(base.instances, experts, strict=True))
    return tuple(held.get(instance, ()) for instance in roster.instances)


class Epochs:
    """The epoch of each roster, decided when it is first asked for: later it is the same, whatever is known by then."""

    def __init__(self, config: Config, model: ModelConfig) -> None:
        self._config, self._model = config, model
        self.loads: Sequence[int] = ()
        """How often each expert was chosen when they were placed last."""
        self.decided: dict[int, Epoch] = {}
        """By number."""

    def check(self, shape: Shape) -> None:
        """Raises ValueError naming the setting that does not fit this model."""
        epoch_of(self._config, self._model, shape, 1, self.loads).check(self._model)

    def of(self, roster: Roster, lost: Roster | None = None) -> Epoch:
        """`lost`: what the roster is to replace in a recovery. Who lives keeps the experts that it holds, so that those alone are read that
        nobody has left; otherwise they are placed by load."""
        if roster.number not in self.decided:
            epoch = epoch_of(self._config, self._model, roster.shape, roster.number, self.loads)
            if lost is not None and roster.ffn:
                held = kept_experts(lost, self.of(lost).expert_map(self._model), roster)
                epoch = replace(epoch, experts=spread_experts(held, self._model.moe_num_experts))
            self.decided[roster.number] = epoch
        return self.decided[roster.number]

    def forget(self, but: Collection[int]) -> None:
        """All epochs but those with these numbers are over."""
        self.decided = {number: epoch for number, epoch in self.decided.items() if number in but}
