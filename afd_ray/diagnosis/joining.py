"""Why a Ray cluster did not let this process in, from what Ray says."""

from collections.abc import Mapping

from afd_ray.diagnosis.finding import Finding


def clash(theirs: Mapping[str, str], ours: Mapping[str, str]) -> Finding | None:
    """Ray lets nobody in whose Ray or Python is another version than the cluster's."""
    differ = [f"{name} {theirs[name]} there, {ours.get(name)} here" for name in theirs if theirs[name] != ours.get(name)]
    if not differ:
        return None
    change = "install the cluster's versions of Ray and Python here"
    return Finding("versions", "error", "this host", f"its versions are not those of the cluster: {'; '.join(differ)}", change)


def explain(address: str, said: str) -> Finding:
    """`said`: the text of Ray's error; what it is not known by is shown in its own first line."""
    text = said.lower()
    if "invalidauthtoken" in text or "unauthenticated" in text or "authentication token" in text:
        change = "copy the token file of the head (~/.ray/auth_token or RAY_AUTH_TOKEN_PATH) here, and set RAY_AUTH_MODE=token"
        found = f"the Ray cluster at {address} wants another token than this process has"
        return Finding("token", "error", address, found, change)
    if "no node info found" in text:
        found = f"this host is no node of the Ray cluster at {address}"
        return Finding(
            "addresses", "error", "this host", found, f"run it on a host of the cluster, or join: ray start --address={address}"
        )
    first = next((line.strip() for line in said.splitlines() if line.strip()), "no reason given")
    change = "see that the head runs (`ray status` there), and that its port is open from here"
    return Finding("addresses", "error", address, f"no Ray cluster at {address} ({first})", change)
