"""Which member takes which rank of a coming epoch: who stays, who leaves, how many are needed; and what serves soonest after a loss."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

from afd_ray.membership.events import Roster
from afd_ray.membership.shape import Shape

Place = str | None
"""A member's id; None: to be provided."""


class Staff(NamedTuple):
    """A shape with its ranks taken, as far as there are members."""

    shape: Shape
    attention: tuple[Place, ...]
    ffn: tuple[Place, ...]


class Living(NamedTuple):
    """Who can be given a rank, spares beside those of the base that live."""

    base: Collection[str]
    spare_attention: Sequence[str] = ()
    spare_ffn: Sequence[str] = ()
    blank: Collection[str] = ()
    """Of the spares, those that have not loaded anything yet."""

    def ready(self, base: Sequence[str], spares: Sequence[str]) -> list[str]:
        """Of a role's spares those that a recovery need not wait for; all of them where no other, of the `base` or spare, could serve."""
        loaded = [member for member in spares if member not in self.blank]
        return loaded if loaded or any(member in self.base for member in base) else list(spares)


def staff(shape: Shape, base: Roster | None, living: Living) -> Staff:
    """This shape, with everybody who can stay where the least has to be loaded."""
    attention = [member for member in base.attention if member in living.base] if base else []
    return Staff(shape, seat_attention(shape.attention, [*attention, *living.spare_attention]), seat_ffn(shape, base, living))


def seat_attention(count: int, members: Sequence[str]) -> tuple[Place, ...]:
    """The first members at the lowest ranks.

    >>> seat_attention(3, ["attention-0", "attention-2"])
    ('attention-0', 'attention-2', None)
    """
    return (*members[:count], *[None] * (count - len(members)))


def seat_ffn(shape: Shape, base: Roster | None, living: Living) -> tuple[Place, ...]:
    """Each member where most of what it holds is needed, a nearly contiguous placement of the experts taken for granted."""
    places: list[Place] = [None] * shape.ffn
    held = dict(enumerate(base.ffn)) if base else {}
    here = {rank: member for rank, member in held.items() if member in living.base}
    if base is not None:
        shared = {(old, new): _overlap(base.shape, old, shape, new) for old in here for new in range(shape.ffn)}
        for old, new in sorted(shared, key=lambda pair: (-shared[pair], pair[1], pair[0])):
            if old in here and places[new] is None and shared[old, new]:
                places[new] = here.pop(old)
    others = [*here.values(), *living.spare_ffn]
    return tuple(place if place or not others else others.pop(0) for place in places)


def recovery(base: Roster, wanted: Shape, living: Living) -> Staff:
    """What serves soonest with those who live; only where no attention or no FFN member does are the wanted ones to be provided.

    FFN instances that are whole stay as they are, and the others' living ranks make whole ones as far as they go. Where no whole instance
    is left, all living ranks make one, of fewer ranks. A spare that has yet to read its weights comes in with the resize that follows.
    """
    attention = [member for member in base.attention if member in living.base]
    missing = max(0, wanted.attention - len(attention))
    attention += living.ready(base.attention, living.spare_attention)[:missing]
    count = len(attention) or wanted.attention
    shape, ffn = _surviving_ffn(base, wanted, living)
    return Staff(replace(shape, attention=count), seat_attention(count, attention), ffn)


def _surviving_ffn(base: Roster, wanted: Shape, living: Living) -> tuple[Shape, tuple[Place, ...]]:
    """The FFN's part of a shape, and who is in it."""
    ranks = base.shape.tensor_parallel
    whole = [instance for instance in base.instances if all(member in living.base for member in instance)]
    stay = {member for instance in whole for member in instance}
    rest = [member for member in base.ffn if member in living.base and member not in stay]
    rest += living.ready(base.ffn, living.spare_ffn)
    room = max(len(base.instances), wanted.expert_parallel) - len(whole)
    whole += [tuple(rest[i : i + ranks]) for i in range(0, len(rest) - ranks + 1, ranks)][:room] if ranks else []
    if whole:
        return replace(base.shape, expert_parallel=len(whole)), tuple(member for one in whole for member in one)
    if rest:
        return replace(base.shape, tensor_parallel=len(rest), expert_parallel=1), tuple(rest)
    return replace(wanted, micro_batches=base.shape.micro_batches), (None,) * wanted.ffn


def _overlap(old_shape: Shape, old: int, new_shape: Shape, new: int) -> int:
    """How much of the experts' weights ranks of two shapes have in common, in a unit that fits both."""
    old_instance, old_slice = divmod(old, old_shape.tensor_parallel)
    new_instance, new_slice = divmod(new, new_shape.tensor_parallel)
    experts = _common(old_instance, old_shape.expert_parallel, new_instance, new_shape.expert_parallel)
    return experts * _common(old_slice, old_shape.tensor_parallel, new_slice, new_shape.tensor_parallel)


def _common(old: int, olds: int, new: int, news: int) -> int:
    """What part `old` of `olds` and part `new` of `news` have in common, in units of 1 / (olds * news)."""
    return max(0, min((old + 1) * news, (new + 1) * olds) - max(old * news, new * olds))
