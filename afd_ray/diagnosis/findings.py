"""From facts to findings: what is wrong, where, and what to change."""

import difflib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping

from afd_ray.config import Config
from afd_ray.diagnosis.devices import device_findings
from afd_ray.diagnosis.facts import ClusterFacts, HostFacts, Meeting
from afd_ray.diagnosis.finding import Finding, by_value, listed, others

CLOCK_APART_S = 0.5
OPEN_FILES = 4096
"""Ray opens some for every worker, the ingress one for every client."""


def diagnose(config: Config, facts: ClusterFacts) -> list[Finding]:
    """Everything that is wrong, errors first; empty when a cluster of this configuration can be expected to come up."""
    findings = [
        *_silent(facts),
        *_versions(facts.hosts),
        *_addresses(facts.hosts),
        *_ports(config, facts),
        *_token(facts.hosts),
        *_labels(config, facts.hosts),
        *_model(config, facts.hosts),
        *device_findings(config, facts),
        *_shared_memory(facts),
        *_reachability(facts.meetings),
        *open_doors(config),
        *_clock(facts.hosts),
        *_open_files(facts.hosts),
    ]
    if facts.placement_error is not None and not any(finding.check == "labels" for finding in findings):
        findings.append(_no_room(facts.placement_error))
    return sorted(findings, key=lambda finding: finding.severity)


def _silent(facts: ClusterFacts) -> Iterator[Finding]:
    for host in facts.silent:
        change = "install this project there with the versions of the other hosts, or see the logs of Ray on that host"
        yield Finding("start", "error", f"{host.name} ({host.address})", f"no process of ours came up: {host.reason}", change)


def _versions(hosts: Iterable[HostFacts]) -> Iterator[Finding]:
    hosts = list(hosts)
    for host in hosts:
        for requirement in host.unmet:
            yield Finding("versions", "error", str(host), f"needs {requirement}", "install this project anew on that host")
    for package in sorted({package for host in hosts for package in host.versions}):
        found = by_value({host.name: host.versions.get(package, "missing") for host in hosts})
        if len(found) > 1:
            yield Finding(
                "versions", "error", others(found), f"{package} differs: {listed(found)}", f"install one {package} everywhere"
            )


def _addresses(hosts: Iterable[HostFacts]) -> Iterator[Finding]:
    hosts = list(hosts)
    for host in hosts:
        if host.listen_error is not None:
            change = "start Ray there with --node-ip-address=ADDRESS, an address of that host that the others reach"
            yield Finding("addresses", "error", str(host), f"nothing can listen on its address: {host.listen_error}", change)
        elif len(hosts) > 1 and ipaddress.ip_address(host.address).is_loopback:
            change = "start Ray on every host with --node-ip-address=ADDRESS, an address that the other hosts reach"
            yield Finding("addresses", "error", str(host), "its address is the loopback one, which no other host reaches", change)


def _ports(config: Config, facts: ClusterFacts) -> Iterator[Finding]:
    if facts.port_error is not None:
        change = "stop what listens there, or give server.host and server.port that are free"
        where = f"{config.server.host}:{config.server.port}"
        yield Finding("ports", "error", where, f"the ingress cannot listen there: {facts.port_error}", change)


def _token(hosts: Iterable[HostFacts]) -> Iterator[Finding]:
    hosts = list(hosts)
    without = [host.name for host in hosts if not host.token]
    if without and len(hosts) > 1:
        found = "Ray runs without a token there: whoever reaches its ports can run anything on every host"
        change = "`ray get-auth-token --generate`, the same file on every host, RAY_AUTH_MODE=token before `ray start`"
        yield Finding("token", "error", ", ".join(without), found, change)


def _labels(config: Config, hosts: Iterable[HostFacts]) -> Iterator[Finding]:
    hosts = list(hosts)
    for role, wanted in (("attention", config.attention.labels), ("ffn", config.ffn.labels)):
        if any(host.labels is None or wanted.items() <= dict(host.labels).items() for host in hosts):
            continue
        asked = ", ".join(f"{key}={value}" for key, value in wanted.items())
        found = f"no host carries {asked}, which {role}.labels asks for{_present(wanted, hosts)}"
        yield Finding(
            "labels", "error", "the cluster", found, f"`ray start --labels={asked}` on hosts for {role}, or change {role}.labels"
        )


def _present(wanted: Mapping[str, str], hosts: Iterable[HostFacts]) -> str:
    """What there is of these labels, whatever its value; of a label that nobody has, the one nearest to it."""
    present = sorted({f"{key}={value}" for host in hosts for key, value in (host.labels or {}).items()})
    same = [label for label in present if label.partition("=")[0] in wanted]
    asked = ", ".join(f"{key}={value}" for key, value in wanted.items())
    shown = same or difflib.get_close_matches(asked, present, n=1)
    return f"; there {'is' if len(shown) == 1 else 'are'} {', '.join(shown)}" if shown else ""


def _model(config: Config, hosts: Iterable[HostFacts]) -> Iterator[Finding]:
    hosts = list(hosts)
    for host in hosts:
        if host.model_error is not None:
            change = f"put the checkpoint at {config.model.path} on every host, by a copy or a shared directory"
            yield Finding("model", "error", str(host), host.model_error, change)
    found = by_value({host.name: host.model for host in hosts if host.model is not None})
    if len(found) > 1:
        yield Finding(
            "model", "error", others(found), f"the checkpoint differs: {listed(found)}", "copy one checkpoint to every host"
        )


def _shared_memory(facts: ClusterFacts) -> Iterator[Finding]:
    for host in facts.hosts:
        if host.shm_free_bytes < facts.shm_needed_bytes:
            found = (
                f"/dev/shm has {_mib(host.shm_free_bytes)} of {_mib(host.shm_total_bytes)} free, "
                f"the links of one host need {_mib(facts.shm_needed_bytes)}"
            )
            change = (
                "mount a larger /dev/shm (docker: --shm-size; Kubernetes: an emptyDir of medium Memory), or give Ray less of it"
            )
            yield Finding("shared memory", "error", str(host), found, change)


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):.0f} MiB"


def _reachability(meetings: Iterable[Meeting]) -> Iterator[Finding]:
    for meeting in meetings:
        if meeting.error is not None:
            within = meeting.first == meeting.second
            where = meeting.first if within else f"{meeting.first} and {meeting.second}"
            change = (
                "see that /dev/shm can be written there"
                if within
                else "open all TCP ports from 1024 between the hosts, both ways (docs/security.md says what listens)"
            )
            yield Finding("reachability", "error", where, f"no {meeting.kind} link: {meeting.error}", change)


def open_doors(config: Config) -> Iterator[Finding]:
    """What anybody may do who reaches a server of this configuration from another host."""
    server = config.server
    if is_loopback(server.host):
        return
    for role, file in (("admin", server.admin_keys_file), ("api", server.api_keys_file)):
        if file is None:
            what = "resize and trace the cluster" if role == "admin" else "send requests"
            change = (
                f"`afd-ray keys add FILE` and server.{role}_keys_file: FILE, or a server.host that only trusted clients reach"
            )
            yield Finding(
                "access", "warning", server.host, f"whoever reaches the port can {what}: no server.{role}_keys_file", change
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _clock(hosts: Iterable[HostFacts]) -> Iterator[Finding]:
    """Against the host whose clock is in the middle: where one is wrong, it is not that one."""
    by_clock = sorted(hosts, key=lambda host: host.clock_ahead_s)
    if not by_clock:
        return
    middle = by_clock[(len(by_clock) - 1) // 2]
    for host in by_clock:
        apart_s = host.clock_ahead_s - middle.clock_ahead_s
        if abs(apart_s) - host.clock_doubt_s - middle.clock_doubt_s > CLOCK_APART_S:
            way = "ahead of" if apart_s > 0 else "behind"
            found = f"its clock is {abs(apart_s):.1f} s {way} that of {middle.name}: traces and logs will not line up"
            yield Finding("clock", "warning", str(host), found, "have chrony or systemd-timesyncd set it")


def _open_files(hosts: Iterable[HostFacts]) -> Iterator[Finding]:
    for host in hosts:
        if host.open_files < OPEN_FILES:
            found = f"a process may have {host.open_files} files open, {OPEN_FILES} are wanted"
            yield Finding("open files", "warning", str(host), found, "`ulimit -n 65536` before `ray start`")


def _no_room(error: str) -> Finding:
    return Finding("room", "error", "the cluster", error, "add hosts, or ask for fewer or smaller actors")
