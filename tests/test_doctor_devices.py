"""The doctor on GPUs and the links between them: each planted fault is found and says what to change; a sound cluster has none."""

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.device import is_installed
from actors.doctor import devices
from actors.doctor.examination import examine_here
from actors.doctor.host import host_facts
from afd_ray.config import load_config
from afd_ray.diagnosis.facts import ClusterFacts, DeviceFacts, HostFacts
from afd_ray.diagnosis.finding import Finding
from afd_ray.diagnosis.findings import diagnose
from tests.test_doctor import host

GPUS = ["attention.num_gpus=1", "ffn.num_gpus=1"]
DEVICES = DeviceFacts(8, None, "570.86", "12.8", "2.27.5", frozenset())
A, F = (host(name, address=address, devices=DEVICES) for name, address in (("a", "10.0.0.1"), ("f", "10.0.0.2")))
HEAD = host("head", address="10.0.0.3", devices=replace(DEVICES, gpus=0, error="no driver", missing=frozenset({"cupy"})))
APART = ClusterFacts(hosts=(HEAD, A, F), placed={"attention": ("a",), "ffn": ("f",)})
TOGETHER = replace(APART, placed={"attention": ("f",), "ffn": ("f",)})


def with_f(facts: ClusterFacts, **changed: Any) -> ClusterFacts:
    hosts = tuple(replace(each, devices=replace(DEVICES, **changed)) if each is F else each for each in facts.hosts)
    return replace(facts, hosts=hosts)


def findings(facts: ClusterFacts, kind: str, *overrides: str) -> list[Finding]:
    return diagnose(load_config(None, [*GPUS, f"handoff.kind={kind}", *overrides]), facts)


@pytest.mark.parametrize(("kind", "facts"), [("nccl", APART), ("nccl", TOGETHER), ("ipc", TOGETHER), ("auto", APART)])
def test_nothing_is_found_where_nothing_is_wrong(kind: str, facts: ClusterFacts) -> None:
    """The head, which holds no actor, needs nothing."""
    assert findings(facts, kind) == []


SHARED = ("attention.num_gpus=0.5", "ffn.num_gpus=0.5")
WITHOUT_BINDINGS = {"missing": frozenset({"cuda.bindings"})}
PLANTED: dict[str, tuple[ClusterFacts, str, tuple[str, ...], str, str, str]] = {
    "no GPU": (with_f(APART, gpus=0, error="no NVIDIA driver"), "auto", (), "gpus", "f (10.0.0.2)", "GPU: no NVIDIA driver"),
    "torch without CUDA": (with_f(APART, torch_cuda=None), "auto", (), "gpus", "f (10.0.0.2)", "its torch is built without"),
    "no Triton": (with_f(APART, missing=frozenset({"triton"})), "auto", (), "gpus", "f (10.0.0.2)", "num_gpus: 1 need Triton"),
    "hosts apart": (
        APART,
        "ipc",
        (),
        "device links",
        "the cluster",
        "wants all actors on one host, and they would be placed apart: attention on a; ffn on f",
    ),
    "one role apart": (
        replace(APART, placed={"attention": ("a", "f"), "ffn": ("f",)}),
        "ipc",
        (),
        "device links",
        "the cluster",
        "attention on a, f; ffn on f",
    ),
    "ipc without cuda-bindings": (
        with_f(TOGETHER, **WITHOUT_BINDINGS),
        "ipc",
        (),
        "device links",
        "f (10.0.0.2)",
        "handoff.kind: ipc needs cuda-bindings",
    ),
    "nccl without cuda-bindings": (
        with_f(APART, **WITHOUT_BINDINGS),
        "nccl",
        (),
        "device links",
        "f (10.0.0.2)",
        "handoff.kind: nccl needs cuda-bindings",
    ),
    "no CuPy": (
        with_f(APART, missing=frozenset({"cupy"})),
        "nccl",
        (),
        "device links",
        "f (10.0.0.2)",
        "handoff.kind: nccl needs CuPy",
    ),
    "no NCCL": (with_f(APART, nccl=None), "nccl", (), "device links", "f (10.0.0.2)", "handoff.kind: nccl needs NCCL"),
    "another NCCL": (
        with_f(APART, nccl="2.28.3"),
        "nccl",
        (),
        "device links",
        "f",
        "NCCL differs: 2.27.5 on a; 2.28.3 on f",
    ),
    "an old NCCL on shared GPUs": (
        TOGETHER,
        "nccl",
        SHARED,
        "device links",
        "f (10.0.0.2)",
        "share a GPU needs NCCL 2.30 or later, it has 2.27.5",
    ),
    "another driver": (
        with_f(APART, driver="580.1"),
        "nccl",
        (),
        "device links",
        "f",
        "driver differs: 570.86 on a; 580.1 on f",
    ),
}


@pytest.mark.parametrize(("facts", "kind", "overrides", "check", "where", "said"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found_and_nothing_else(
    facts: ClusterFacts, kind: str, overrides: tuple[str, ...], check: str, where: str, said: str
) -> None:
    (finding,) = findings(facts, kind, *overrides)
    assert (finding.check, finding.where) == (check, where)
    assert said in finding.found
    assert finding.change
    assert "\n" not in finding.found + finding.change
    assert finding.severity == ("warning" if "driver" in finding.found and "differs" in finding.found else "error")


def test_what_a_kind_of_link_does_not_use_may_be_missing_or_differ() -> None:
    changed = {"missing": frozenset({"cupy"}), "nccl": None, "driver": "580.1"}
    assert findings(with_f(TOGETHER, **changed), "ipc") == []
    assert findings(with_f(APART, **(changed | WITHOUT_BINDINGS)), "auto") == []


def test_nccl_new_enough_for_shared_gpus() -> None:
    facts = with_f(TOGETHER, nccl="2.30.1")
    assert findings(facts, "nccl", *SHARED) == []
    assert [finding.check for finding in findings(TOGETHER, "nccl", "attention.num_gpus=0.5")] == ["device links"]
    assert findings(TOGETHER, "ipc", *SHARED) == []


def test_two_ray_nodes_of_one_host_are_one_host_to_ipc() -> None:
    beside = replace(F, address=A.address)
    assert findings(replace(APART, hosts=(HEAD, A, beside)), "ipc") == []


def test_only_roles_with_gpus_count() -> None:
    facts = with_f(APART, gpus=0, error="no driver")
    assert diagnose(load_config(None, ["attention.num_gpus=1"]), facts) == []
    (finding,) = diagnose(load_config(None, ["ffn.num_gpus=1"]), facts)
    assert finding.found == "ffn.num_gpus: 1 needs a CUDA GPU: no driver"


def test_without_a_placement_hosts_with_gpus_count_and_a_host_alone() -> None:
    unknown = with_f(replace(APART, placed={}), missing=frozenset({"cupy"}))
    assert [finding.where for finding in findings(unknown, "nccl")] == ["f (10.0.0.2)"]
    alone = replace(APART, placed={}, hosts=(HEAD,))
    assert [finding.check for finding in findings(alone, "nccl")] == ["gpus", "device links"]


def test_a_configuration_without_gpus_asks_for_none() -> None:
    facts = host_facts(load_config("demo"), "127.0.0.1")
    assert facts.devices is None
    assert diagnose(load_config(None), replace(APART, hosts=(replace(HEAD, devices=None),))) == []


def test_this_host_is_seen_as_it_is() -> None:
    config = load_config("demo", [*GPUS, "handoff.kind=nccl"])
    (seen,) = examine_here(config, "127.0.0.1").hosts
    assert isinstance(seen, HostFacts)
    assert seen.devices is not None
    assert (seen.devices.error is None) is (seen.devices.gpus > 0)
    assert seen.devices.torch_cuda == torch.version.cuda
    assert seen.devices.missing == {module for module in devices.WANTED if not is_installed(module)}


class ManagementLibrary:
    """NVML of two GPUs, as far as it is asked."""

    def __init__(self, code: int = 0, gpus: int = 2) -> None:
        self.code, self.gpus = code, gpus
        self.is_open = False

    def nvmlInit_v2(self) -> int:
        self.is_open = self.code == 0
        return self.code

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = self.gpus
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:
        assert size == len(text)
        text.value = b"570.86"
        return 0

    def nvmlShutdown(self) -> int:
        self.is_open = False
        return 0


@pytest.mark.parametrize(
    ("code", "gpus", "expected"),
    [
        (0, 2, devices.Seen(2, "570.86", None)),
        (0, 0, devices.Seen(0, "570.86", "the NVIDIA driver finds none there")),
        (9, 2, devices.Seen(0, None, "the NVIDIA driver does not answer (NVML's error 9)")),
    ],
)
def test_gpus_are_counted_by_the_driver(monkeypatch: pytest.MonkeyPatch, code: int, gpus: int, expected: devices.Seen) -> None:
    """On a stand-in for its library."""
    library = ManagementLibrary(code, gpus)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert devices.seen_gpus() == expected
    assert not library.is_open


def test_a_host_without_a_driver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "NVML", "libnone.so.1")
    assert devices.seen_gpus() == devices.Seen(0, None, "no NVIDIA driver there (libnone.so.1 is missing)")


def test_the_nccl_that_torch_has_loaded_goes_before_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = {"nvidia-nccl-cu12": "2.26.2", "nvidia-nccl-cu13": "2.27.7"}

    def version(name: str) -> str:
        if name not in packages:
            raise devices.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(devices.metadata, "version", version)
    monkeypatch.delattr(torch._C, "_nccl_version", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert devices.nccl_version() == "2.26.2"
    monkeypatch.setattr(torch._C, "_nccl_version", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 4))
    assert devices.nccl_version() == "2.30.4"
    packages.clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert devices.nccl_version() is None
