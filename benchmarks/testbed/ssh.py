"""`sshd` on the hosts of a test bed, and on one of them the key that opens the others."""

import shutil
from collections.abc import Mapping, Sequence

from benchmarks.testbed.bed import Bed

TOOLS = ("sshd", "ssh", "ssh-keygen", "rsync")
KEY = "~/.ssh/id_ed25519"

_CONFIG = """
HostKey /run/sshd/key
AuthorizedKeysFile /run/sshd/authorized
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""
_START = "mkdir -p /run/sshd && cd /run/sshd && ssh-keygen -q -t ed25519 -N '' -f key && echo '{key}' > authorized && cat > config && {sshd} -f $PWD/config"


def why_no_ssh() -> str | None:
    """One line: what is missing; None where hosts can have `sshd`."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path="/usr/sbin:/usr/bin:/bin") is None]
    return f"ray up needs {', '.join(missing)} (packages openssh-server, openssh-client, rsync)" if missing else None


def let_in(hosts: Bed, operator: str, names: Sequence[str], environment: Mapping[str, str]) -> None:
    """From now on `operator` logs in on these hosts with the key at KEY; `environment`: of whoever logs in."""
    keygen = f"mkdir -p ~/.ssh && ssh-keygen -q -t ed25519 -N '' -f {KEY} && cat {KEY}.pub"
    key = hosts[operator].run(["sh", "-c", keygen]).strip()
    own = " ".join(f"{name}={value}" for name, value in environment.items())
    config = f"{_CONFIG}SetEnv {own}\n"
    start = _START.format(key=key, sshd=shutil.which("sshd", path="/usr/sbin:/usr/bin"))
    for name in names:
        hosts[name].run(["sh", "-c", start], input=config)
