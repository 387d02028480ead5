"""Policies by name: a built-in one, or `module:function`."""

import importlib
from typing import cast

from afd_ray.autoscaling.policies import BUILT_IN
from afd_ray.autoscaling.values import Policy


def load_policy(name: str) -> Policy:
    """The policy of this name; raises ValueError in one line when there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, separator, function = name.partition(":")
    if not separator:
        raise ValueError(f"autoscaling.policy: {name} is not known, use {', '.join(BUILT_IN)} or module:function")
    try:
        policy = getattr(importlib.import_module(module_name), function)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ValueError(f"autoscaling.policy: {name} cannot be loaded: {' '.join(str(error).split())}") from None
    if not callable(policy):
        raise ValueError(f"autoscaling.policy: {name} is no function")
    return cast(Policy, policy)
