"""What a configuration asks for, as the groups that the planner places."""

from typing import Literal

from afd_ray.config import Config
from placement.planner import Group


def attention_group(config: Config) -> Group:
    """One attention actor."""
    asked = config.attention
    return Group("attention", 1, asked.num_cpus, asked.num_gpus, frozenset(asked.labels.items()), config.placement.attention)


def ffn_group(config: Config, actors: int) -> Group:
    """The ranks of one FFN instance."""
    asked = config.ffn
    return Group("ffn", actors, asked.num_cpus, asked.num_gpus, frozenset(asked.labels.items()), config.placement.ffn)


def groups(config: Config) -> list[Group]:
    """Of the whole configured cluster."""
    instances = config.ffn.ranks // config.ffn.tensor_parallel
    return [attention_group(config)] * config.attention.replicas + [ffn_group(config, config.ffn.tensor_parallel)] * instances


def separate_nodes(config: Config) -> bool | Literal["auto"]:
    """As the planner takes it: colocated actors are all of one role."""
    return False if config.ffn.colocated else config.placement.separate_nodes
