"""Why a Ray cluster did not let this process in, from what Ray says."""

from afd_ray.diagnosis.findings import Finding

VERSION_MISMATCH = "version mismatch"


def explain(address: str, said: str) -> Finding:
    """`said`: the text of Ray's error; what it is not known by is shown in its own first line."""
    text = said.lower()
    if "invalidauthtoken" in text or "unauthenticated" in text or "authentication token" in text:
        change = "copy the token file of the head (~/.ray/auth_token or RAY_AUTH_TOKEN_PATH) here, and set RAY_AUTH_MODE=token"
        found = f"the Ray cluster at {address} wants another token than this process has"
        return Finding("token", "error", address, found, change)
    if VERSION_MISMATCH in text:
        found = " ".join(said[text.index(VERSION_MISMATCH) :].split())
        return Finding("versions", "error", "this host", found, "install the head's versions of Ray and Python here")
    first = next((line.strip() for line in said.splitlines() if line.strip()), "no reason given")
    change = "see that the head runs (`ray status` there), and that its port is open from here"
    return Finding("addresses", "error", address, f"no Ray cluster at {address} ({first})", change)
