"""`afd-ray doctor`: what is wrong with this host, or with the hosts of a Ray cluster, and what to change."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from actors.commands.arguments import add_config, add_json, host_and_port
from actors.commands.joining import use_token

if TYPE_CHECKING:
    from afd_ray.config import Config
    from afd_ray.diagnosis.facts import ClusterFacts
    from afd_ray.diagnosis.finding import Finding


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="say what keeps a cluster from coming up, and what to change; exit 1 if anything does"
    )
    add_config(parser)
    parser.add_argument(
        "--address",
        type=host_and_port,
        metavar="HOST:PORT",
        help="every host of this Ray cluster, and every pair (default: this host)",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from afd_ray.config import check_supported, load_deployed

    config = load_deployed(args.config, args.overrides)
    check_supported(config)
    if args.address is not None:
        use_token()
    described, findings = _examine(config, args.address)
    if args.as_json:
        print(json.dumps({"examined": described, "findings": [finding._asdict() for finding in findings]}, indent=2))
    else:
        _show(described, findings)
    return 1 if any(finding.severity == "error" for finding in findings) else 0


def _examine(config: "Config", address: str | None) -> "tuple[dict[str, Any] | None, list[Finding]]":
    """What was looked at, and what is wrong; None where the cluster does not let this process in."""
    import asyncio

    import ray

    from actors.doctor.examination import examine_cluster, examine_here
    from actors.joining import Refused, joined
    from afd_ray.diagnosis.findings import diagnose

    if address is None:
        facts = examine_here(config, ray.util.get_node_ip_address())
    else:
        try:
            with joined(address):
                facts = asyncio.run(examine_cluster(config))
        except Refused as refusal:
            return None, [refusal.finding]
    return describe(facts), diagnose(config, facts)


def describe(facts: "ClusterFacts") -> dict[str, Any]:
    """What was looked at, as JSON."""
    hosts = [
        {
            "name": host.name,
            "address": host.address,
            "versions": dict(host.versions),
            "labels": dict(host.labels or {}),
            "clock_ahead_s": round(host.clock_ahead_s, 3),
            "shm_free_bytes": host.shm_free_bytes,
        }
        for host in facts.hosts
    ]
    links = [{"hosts": [link.first, link.second], "kind": link.kind, "error": link.error} for link in facts.meetings]
    return {
        "hosts": hosts,
        "silent": [host.name for host in facts.silent],
        "links": links,
        "shm_needed_bytes": facts.shm_needed_bytes,
    }


def _show(described: dict[str, Any] | None, findings: "list[Finding]") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True)
    if described is not None:
        hosts = [host["name"] for host in described["hosts"]] + described["silent"]
        tried = len(described["links"])
        console.print(Text(f"looked at {', '.join(hosts)}, and tried {tried} link{'' if tried == 1 else 's'}"))
    for finding in findings:
        style = "bold red" if finding.severity == "error" else "yellow"
        console.print(Text(f"{finding.severity}: {finding.check}, {finding.where}", style))
        console.print(Text(f"  {finding.found}\n  change: {finding.change}"))
    if not findings:
        console.print(Text("nothing is wrong", "green"))
