"""The storm of a seed: what goes wrong, at which time or at which point of a change."""

from collections.abc import Callable

from afd_ray.simulation.protocol.cluster import Cluster
from afd_ray.simulation.protocol.world import World

Fault = Callable[["World", "Cluster"], None]


def plan_faults(world: World, cluster: Cluster) -> float:
    """Schedule them; gives when the last one is over, everything cut healed and everything stopped going on."""
    random = world.random
    storm_s = world.delay(3.0, 8.0)
    begins_s = 0.0 if random.random() < 0.15 else 1.0
    cluster.repeats = 0.05 if random.random() < 0.3 else 0.0
    if random.random() < 0.3:
        cluster.slowness = random.choice((0.01, 0.05))
    if random.random() < 0.2:
        cluster.impatience = 0.5
    if random.random() < 0.15:
        cluster.stuck = 0.02
    if random.random() < 0.25:
        cluster.failing = frozenset(random.sample(("load", "prepare", "connect", "drain", "move_out", "switch", "resume"), 2))
    if random.random() < 0.25:
        cluster.scarcity = random.choice((0.3, 0.8))
    for _ in range(random.randrange(0, 6)):
        world.after(world.delay(begins_s, storm_s), random.choice(FAULTS), world, cluster)
    if random.random() < 0.6:
        ambush(world, cluster, random.choice(FAULTS))
    world.after(storm_s, _calm, world, cluster)
    return storm_s


def ambush(world: World, cluster: Cluster, fault: Fault) -> None:
    """Strike a moment after a change has come to a phase of its own."""
    cluster.ambush = (world.random.choice(PHASES), lambda: world.after(world.delay(0.0, 0.05), fault, world, cluster))


PHASES = (
    "provide",
    "load",
    "prepare",
    "connect",
    "move_out",
    "drain",
    "switch",
    "retire",
    "resume",
    "discard",
    "fence",
    "settle",
)


def kill(world: World, cluster: Cluster) -> None:
    name = _someone(world, cluster)
    if name:
        cluster.kill(name)


def kill_half(world: World, cluster: Cluster) -> None:
    """A machine with several members on it."""
    role = world.random.choice(("attention", "ffn", ""))
    for name in _living(cluster):
        if name.startswith(role) and world.random.random() < 0.6:
            cluster.kill(name)


def pause(world: World, cluster: Cluster) -> None:
    name = _someone(world, cluster)
    if name:
        cluster.pause(name)
        world.after(world.random.choice((0.1, 0.4, 1.0, 3.0)), cluster.go_on, name)


def pause_many(world: World, cluster: Cluster) -> None:
    role = world.random.choice(("attention", "ffn", ""))
    for name in _living(cluster):
        if name.startswith(role) and world.random.random() < 0.8:
            cluster.pause(name)
            world.after(world.delay(0.3, 1.5), cluster.go_on, name)


def cut(world: World, cluster: Cluster) -> None:
    change = cluster.controller.coordinator.change
    one, other = _someone(world, cluster), _someone(world, cluster)
    if change is not None and change.roster.ffn:
        one, other = world.random.choice(change.roster.attention), world.random.choice(change.roster.ffn)
    if world.random.random() < 0.2:
        one = cluster.ingress.name
    if one and other and one != other:
        cluster.cut(one, other)
        world.after(world.delay(0.05, 3.0), cluster.heal, one, other)


def deafen(world: World, cluster: Cluster) -> None:
    name = _someone(world, cluster)
    if name:
        cluster.deafen(name)
        world.after(world.delay(0.1, 3.0), cluster.undeafen, name)


def deafen_many(world: World, cluster: Cluster) -> None:
    """The controller loses sight of most members, which go on without it."""
    role, heals_s = world.random.choice(("ffn", "")), world.delay(0.4, 4.0)
    for name in _living(cluster):
        if name.startswith(role) and (role or world.random.random() < 0.7):
            cluster.deafen(name)
            world.after(heals_s, cluster.undeafen, name)


def kill_controller(world: World, cluster: Cluster) -> None:
    cluster.kill_controller()


def kill_controller_midway(world: World, cluster: Cluster) -> None:
    """Between two effects of what it does next."""
    cluster.controller.dies_in = world.random.randrange(0, 4)


def kill_ingress(world: World, cluster: Cluster) -> None:
    cluster.kill_ingress()


FAULTS: tuple[Fault, ...] = (
    kill,
    kill,
    kill_half,
    pause,
    pause_many,
    cut,
    cut,
    deafen,
    deafen_many,
    kill_controller,
    kill_controller_midway,
    kill_controller_midway,
    kill_ingress,
)


def _living(cluster: Cluster) -> list[str]:
    return [name for name, member in cluster.members.items() if member.alive]


def _someone(world: World, cluster: Cluster) -> str:
    living = _living(cluster)
    return world.random.choice(living) if living else ""


def _calm(world: World, cluster: Cluster) -> None:
    """Nothing goes wrong from here on."""
    cluster.impatience = cluster.repeats = cluster.slowness = cluster.stuck = cluster.scarcity = 0.0
    cluster.failing = frozenset()
    cluster.ambush = None
    cluster.controller.dies_in = None
    for name in list(cluster.deaf):
        cluster.undeafen(name)
    for name in _living(cluster):
        cluster.go_on(name)
    world.heal_all()
