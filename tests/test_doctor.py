"""The doctor: each planted fault is found and says what to change; a sound cluster has none."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from actors.doctor.examination import examine_here
from actors.doctor.host import listen_error, unmet
from actors.doctor.meetings import meet_here
from afd_ray.config import Config, load_config
from afd_ray.diagnosis.facts import ClusterFacts, HostFacts, Meeting, Silent
from afd_ray.diagnosis.finding import Finding
from afd_ray.diagnosis.findings import OPEN_FILES, diagnose
from afd_ray.diagnosis.joining import clash, explain

MIB = 1 << 20
POOLS = ["attention.labels={pool: attention}", "ffn.labels={pool: ffn}"]


def host(name: str, **facts: Any) -> HostFacts:
    """A sound one."""
    sound: dict[str, Any] = {
        "address": "10.0.0.1",
        "versions": {"python": "3.11.9", "torch": "2.13.0", "code": "0123456789ab"},
        "unmet": (),
        "clock_ahead_s": 0.0,
        "clock_doubt_s": 0.001,
        "shm_total_bytes": 1024 * MIB,
        "shm_free_bytes": 512 * MIB,
        "open_files": 65536,
        "listen_error": None,
        "model": "beef",
        "model_error": None,
        "token": True,
    }
    return HostFacts(name, **sound | facts)


HEAD, A, F = host("head"), host("a", labels={"pool": "attention"}), host("f", labels={"pool": "ffn"})
SOUND = ClusterFacts(hosts=(HEAD, A, F), meetings=(Meeting("a", "f", "tcp", None),), shm_needed_bytes=8 * MIB)


def found(facts: ClusterFacts, *overrides: str) -> Finding:
    """The one finding that there must be."""
    (finding,) = diagnose(load_config(None, [*POOLS, *overrides]), facts)
    return finding


def with_f(**facts: Any) -> ClusterFacts:
    return replace(SOUND, hosts=(HEAD, A, replace(F, **facts)))


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    assert diagnose(load_config(None, POOLS), SOUND) == []


PLANTED = {
    "another version": (
        with_f(versions={**F.versions, "torch": "2.11.0"}),
        "versions",
        "f",
        "torch differs: 2.13.0 on head, a; 2.11.0 on f",
    ),
    "other code": (with_f(versions={**F.versions, "code": "ba9876543210"}), "versions", "f", "code differs"),
    "an unmet requirement": (with_f(unmet=("torch<2.14,>=2.11, got 2.9.0",)), "versions", "f (10.0.0.1)", "got 2.9.0"),
    "the loopback address": (with_f(address="127.0.1.1"), "addresses", "f (127.0.1.1)", "which no other host reaches"),
    "an address of another host": (with_f(listen_error="Cannot assign"), "addresses", "f (10.0.0.1)", "Cannot assign"),
    "a taken port": (replace(SOUND, port_error="Address already in use"), "ports", "127.0.0.1:8000", "already in use"),
    "a clock that is ahead": (with_f(clock_ahead_s=3.0), "clock", "f (10.0.0.1)", "3.0 s ahead of that of"),
    "a clock that is behind": (with_f(clock_ahead_s=-3.0), "clock", "f (10.0.0.1)", "3.0 s behind that of"),
    "little shared memory": (
        with_f(shm_free_bytes=MIB, shm_total_bytes=64 * MIB),
        "shared memory",
        "f (10.0.0.1)",
        "has 1 MiB of 64 MiB free",
    ),
    "no token": (with_f(token=False), "token", "f", "without a token"),
    "a missing label": (
        with_f(labels={"pool": "fnn"}),
        "labels",
        "the cluster",
        "pool=ffn, which ffn.labels asks for; there are pool=attention, pool=fnn",
    ),
    "a cut": (
        replace(SOUND, meetings=(Meeting("a", "f", "tcp", "no answer"),)),
        "reachability",
        "a and f",
        "no tcp link: no answer",
    ),
    "no shared rings": (replace(SOUND, meetings=(Meeting("a", "a", "shm", "gone"),)), "reachability", "a", "no shm link: gone"),
    "another checkpoint": (with_f(model="dead"), "model", "f", "the checkpoint differs: beef on head, a; dead on f"),
    "no checkpoint": (with_f(model=None, model_error="/m is no directory"), "model", "f (10.0.0.1)", "/m is no directory"),
    "few open files": (with_f(open_files=OPEN_FILES - 1), "open files", "f (10.0.0.1)", "4095 files open"),
    "a host without us": (replace(SOUND, silent=(Silent("x", "10.0.0.9", "No module"),)), "start", "x (10.0.0.9)", "No module"),
    "no room": (replace(SOUND, placement_error="needed: 3 CPUs"), "room", "the cluster", "needed: 3 CPUs"),
}


@pytest.mark.parametrize(("facts", "check", "where", "said"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(facts: ClusterFacts, check: str, where: str, said: str) -> None:
    finding = found(facts)
    assert (finding.check, finding.where) == (check, where)
    assert said in finding.found
    assert finding.change


def test_a_clock_within_the_doubt_of_its_reading_is_no_finding() -> None:
    assert diagnose(load_config(None, POOLS), with_f(clock_ahead_s=3.0, clock_doubt_s=2.9)) == []


def test_of_two_hosts_one_clock_is_told_of() -> None:
    two = replace(SOUND, hosts=(replace(A, clock_ahead_s=4.0), F))
    assert found(two).where == "a (10.0.0.1)"


def test_a_host_alone_needs_no_token() -> None:
    alone = replace(SOUND, hosts=(replace(A, token=False, address="127.0.0.1"),))
    assert diagnose(Config(), alone) == []


def test_a_host_alone_may_be_given_any_label() -> None:
    facts = examine_here(load_config("demo", ["attention.labels={pool: a}", "ffn.labels={pool: b}"]), "127.0.0.1")
    alone = replace(SOUND, hosts=(replace(A, labels=facts.hosts[0].labels),))
    assert diagnose(load_config(None, ["attention.labels={pool: a}", "ffn.labels={pool: b}"]), alone) == []


def test_a_label_that_nobody_has_is_told_with_the_nearest() -> None:
    finding = found(with_f(labels={"raack": "r1"}), "ffn.labels={rack: r1}")
    assert finding.found == "no host carries rack=r1, which ffn.labels asks for; there is raack=r1"


def test_missing_labels_say_why_there_is_no_room() -> None:
    assert found(replace(with_f(labels={}), placement_error="no node carries the labels pool=ffn")).check == "labels"


def test_an_open_admin_interface_is_warned_of() -> None:
    warnings = diagnose(load_config(None, [*POOLS, "server.host=0.0.0.0"]), SOUND)
    assert [finding.severity for finding in warnings] == ["warning", "warning"]
    assert "server.admin_keys_file" in warnings[0].change
    keys = ["server.admin_keys_file=a", "server.api_keys_file=b"]
    assert diagnose(load_config(None, [*POOLS, "server.host=0.0.0.0", *keys]), SOUND) == []


def test_errors_come_before_warnings() -> None:
    facts = with_f(clock_ahead_s=3.0, labels={})
    assert [finding.severity for finding in diagnose(load_config(None, POOLS), facts)] == ["error", "warning"]


@pytest.mark.parametrize(
    ("said", "check", "text"),
    [
        ("RPC error: InvalidAuthToken: Authentication token is missing or incorrect.", "token", "wants another token"),
        (
            "Failed to connect\nNo node info found matching attributes",
            "addresses",
            "this host is no node of the Ray cluster at h:1",
        ),
        ("\nConnection refused\nmore", "addresses", "no Ray cluster at h:1 (Connection refused)"),
        ("", "addresses", "no Ray cluster at h:1 (no reason given)"),
    ],
)
def test_why_a_cluster_lets_nobody_in(said: str, check: str, text: str) -> None:
    finding = explain("h:1", said)
    assert finding.check == check
    assert text in finding.found
    assert "\n" not in finding.found


def test_a_cluster_of_other_versions_lets_nobody_in() -> None:
    ours = {"ray": "2.60.0", "python": "3.11.7", "torch": "2.13.0"}
    assert clash({"ray": "2.60.0", "python": "3.11.7"}, ours) is None
    finding = clash({"ray": "2.59.0", "python": "3.11.7"}, ours)
    assert finding is not None
    assert finding.found.endswith("ray 2.59.0 there, 2.60.0 here")


def test_a_port_in_use_is_seen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert listen_error("127.0.0.1", listener.getsockname()[1]) == "Address already in use"
    assert listen_error("127.0.0.1", 0) is None
    assert listen_error("203.0.113.1", 0) is not None


def test_this_installation_meets_its_own_requirements() -> None:
    assert list(unmet()) == []


@pytest.mark.parametrize("kind", ["shm", "tcp", "gloo"])
def test_each_kind_of_link_is_really_tried(kind: Any) -> None:
    assert meet_here(kind, "127.0.0.1") is None


def test_a_link_that_cannot_be_had_says_why() -> None:
    assert "cannot listen on host 203.0.113.1" in str(meet_here("tcp", "203.0.113.1"))


def test_without_shared_memory_there_is_no_link_of_that_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("afd_ray.handoff.shm.DIRECTORY", tmp_path / "missing")
    assert "link kind is shm" in str(meet_here("shm", "127.0.0.1"))
