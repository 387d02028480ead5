"""One seed from its first event to the last: the load, the storm, and the calm after it in which everything must come right."""

from dataclasses import dataclass, field

from afd_ray.membership.events import Stopping
from afd_ray.membership.shape import Shape
from afd_ray.simulation.protocol.cluster import Cluster, Parts
from afd_ray.simulation.protocol.faults import plan_faults
from afd_ray.simulation.protocol.world import Violation, World

CALM_S = 40.0
"""After the storm: every request is over and the wanted shape serves within this."""
MOST_EVENTS = 200_000
LOOK_S = 0.25
STOP_S = 2.0
SHAPES = tuple(
    Shape(a, t, e, None) for a, t, e in ((1, 1, 1), (2, 1, 1), (2, 1, 2), (3, 1, 1), (1, 1, 3), (2, 2, 1), (3, 1, 2), (1, 2, 2))
)

COLOCATED = tuple(Shape(a, 1, 0, None) for a in (1, 2, 3))


@dataclass(slots=True)
class Report:
    """What became of one seed."""

    seed: int
    violation: str | None
    events: int
    virtual_s: float
    commits: int = 0
    recoveries: int = 0
    rollbacks: int = 0
    settled_s: float = 0.0
    """From the end of the storm until all was right."""
    trace: list[str] = field(default_factory=list)


def run_seed(seed: int, parts: Parts | None = None, *, tracing: bool = False) -> Report:
    """The same seed and parts give the same events, always."""
    world = World(seed, tracing=tracing)
    cluster = Cluster(world, parts or Parts())
    violation = None
    try:
        _live(world, cluster)
    except Violation as error:
        violation = str(error)
        world.note(f"VIOLATION: {violation}")
    checks = cluster.checks
    counts = checks.commits, checks.recoveries, checks.rollbacks
    return Report(seed, violation, world.events, world.now, *counts, cluster.settled_s, world.trace)


def trace_seed(seed: int, parts: Parts | None = None) -> list[str]:
    """What happened in this seed, a line each."""
    return run_seed(seed, parts, tracing=True).trace


def _live(world: World, cluster: Cluster) -> None:
    random = world.random
    storm_s = plan_faults(world, cluster)
    shapes = COLOCATED if random.random() < 0.08 else SHAPES
    cluster.scale(random.choice(shapes))
    for _ in range(random.randrange(1, 4)):
        world.after(world.delay(0.5, storm_s), cluster.scale, random.choice(shapes))
    for request in range(random.randrange(2, 6)):
        world.after(world.delay(0.0, storm_s), cluster.request, request, random.randrange(1, 24))
    while world.now < storm_s and world.step():
        _check_events(world)
    world.faulty = False
    world.after(2.0, _ask_again, cluster, shapes[-1])
    unsettled = "it has not begun"
    while unsettled and world.now < storm_s + CALM_S:
        until_s = world.now + LOOK_S
        world.after(LOOK_S, lambda: None)
        while world.now < until_s and world.step():
            _check_events(world)
        unsettled = cluster.checks.unsettled()
    if unsettled:
        raise Violation(f"nothing has disturbed it for {CALM_S:g} s, and yet {unsettled}")
    cluster.settled_s = world.now - storm_s
    _stop(world, cluster)


def _ask_again(cluster: Cluster, shape: Shape) -> None:
    """The first epoch has not formed, or a controller's death undid it: whoever starts a cluster tries again."""
    controller, coordinator = cluster.controller, cluster.controller.coordinator
    if controller.alive and coordinator.roster is not None:
        return
    if controller.alive and coordinator.change is None:
        cluster.scale(shape)
    cluster.world.after(2.0, _ask_again, cluster, shape)


def _stop(world: World, cluster: Cluster) -> None:
    """In the end nothing is left, whatever happened before."""
    cluster.controller.on(Stopping())
    until_s = world.now + STOP_S
    world.after(STOP_S, lambda: None)
    while world.now < until_s and world.step():
        _check_events(world)
    alive = sorted(name for name, member in cluster.members.items() if member.alive)
    if alive or cluster.record.members:
        raise Violation(f"after the end {alive} live, and the record is {cluster.record}")


def _check_events(world: World) -> None:
    if world.events > MOST_EVENTS:
        raise Violation(f"{MOST_EVENTS} events and no end")
