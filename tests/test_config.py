import re
from pathlib import Path

import pytest
import yaml

from afd_ray.config import (
    Config,
    ConfigError,
    Model,
    Pace,
    check_supported,
    load_config,
    load_deployed,
    model_directory,
    parse_config,
)
from afd_ray.config_reading import bundled_names
from afd_ray.membership.shape import Shape


def message(raw: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return str(caught.value)


def test_the_bundled_file_states_every_default() -> None:
    config = load_config("demo")
    assert config == Config()
    assert config.ffn.ranks == 1
    assert config.model.served_name == "demo"


def test_every_bundled_configuration_loads() -> None:
    for name in bundled_names():
        check_supported(load_config(name))


def test_every_key_of_the_schema_is_in_the_bundled_file() -> None:
    text = (Path(__file__).parent.parent / "configs" / "demo.yaml").read_text()
    assert yaml.safe_load(text) == Config().model_dump()


def test_an_empty_file_and_empty_sections_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    assert load_config(path) == Config()
    path.write_text("# nothing\nserver:\n  # port: 1\n")
    assert load_config(path) == Config()


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("attention: {replicas: 3}\n")
    overrides = ["attention.replicas=5", "ffn.pace.base_us=100", "model.path=/a=b", "model.name=", "server.port=0"]
    with pytest.raises(ConfigError, match=r"model\.name: must be non-empty text, got ''"):
        load_config(path, overrides)
    overrides[3] = "model.name=null"
    config = load_config(path, overrides)
    assert config.attention.replicas == 5
    assert config.ffn.pace == Pace(base_us=100)
    assert config.model.path == "/a=b"
    assert config.server.port == 0


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"atention": {}}, "atention: unknown key, did you mean attention?"),
        ({"attention": {"replica": 1}}, "attention.replica: unknown key, did you mean attention.replicas?"),
        ({"attention": {"kv_cache": {"blocksize": 1}}}, "did you mean attention.kv_cache.block_size?"),
        ({"port": 1}, "port: unknown key, did you mean server.port?"),
        ({"failure": {"zzz": 1}}, "failure.zzz: unknown key, the keys there are detect_timeout_s, request_timeout_s"),
        ({1: 2}, "1: unknown key"),
        ({"attention": {"replicas": 0}}, "attention.replicas: must be at least 1, got 0"),
        (
            {"simulation": {"failures": [{"at_s": 1, "role": "ffn"}, {"at_s": -5, "role": "head"}]}},
            "simulation.failures.1.at_s: must be at least 0, got -5",
        ),
        ({"simulation": {"failures": [{"at_s": 1, "role": "ffn", "why": 2}]}}, "simulation.failures.0.why: unknown key"),
        ({"attention": {"replicas": True}}, "attention.replicas: must be an integer, got true"),
        ({"attention": {"replicas": 1.5}}, "attention.replicas: must be an integer, got 1.5"),
        ({"attention": {"pace": {}}}, "attention.pace.base_us: missing"),
        ({"attention": {"pace": {"base_us": float("nan")}}}, "attention.pace.base_us: must be a finite number, got nan"),
        ({"attention": {"labels": {"zone": 3}}}, "attention.labels: must be text, got 3"),
        ({"attention": [1]}, "attention: must be a section with keys of its own, got [1]"),
        ({"pipeline": {"micro_batches": 5}}, "pipeline.micro_batches: must be auto or at most 4, got 5"),
        ({"pipeline": {"micro_batches": "two"}}, "pipeline.micro_batches: must be auto or an integer, got 'two'"),
        ({"handoff": {"kind": "udp"}}, "handoff.kind: must be auto, shm, tcp, gloo, ipc or nccl, got 'udp'"),
        ({"placement": {"separate_nodes": 3}}, "placement.separate_nodes: must be auto or true or false, got 3"),
        ({"autoscaling": {"min": {"ffn": 9}}}, "autoscaling.min.ffn: 9 must be at most autoscaling.max.ffn, 4"),
        ({"server": {"port": 70000}}, "server.port: must be at most 65535, got 70000"),
        ([1], "configuration: must hold a mapping of sections, got [1]"),
    ],
)
def test_a_mistake_is_one_line(raw: object, expected: str) -> None:
    text = message(raw)
    assert expected in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"server:\n  port: [1\n", "line "),
        (b"server: {port: 1}\nserver: {port: 2}\n", "line 2: key 'server' is given twice"),
        (b"\xff\xfe\x01", "not valid UTF-8"),
        (b"a: !!python/object:os.system {}\n", "could not determine a constructor"),
        (b"just text\n", "must hold a mapping of sections"),
        (b"a: *b\n", "line 1: found undefined alias"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("nonsense", "--set: 'nonsense' must be key.path=value"),
        ("=1", "must be key.path=value"),
        ("a..b=1", "must be key.path=value"),
        ("server.port.x=1", "server.port: must be an integer"),
        ("server=3", "server: must be a section"),
        ("server.port=[", "--set server.port"),
        ("server.prot=1", "server.prot: unknown key, did you mean server.port?"),
        ("model.name=\udcff", "--set: 'model.name=\\udcff' must be valid UTF-8"),
        (
            "attention.kv_cache.num_blocks=99999999999",
            "attention.kv_cache.num_blocks: must be auto or at most 16777216, got 99999999999",
        ),
    ],
)
def test_a_bad_override_is_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("atention: {}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["server.port=1"])
    assert str(caught.value) == f"{path}: atention: unknown key, did you mean attention?"


def test_a_number_may_have_an_exponent_and_no_point() -> None:
    assert load_config(None, ["handoff.start_timeout_s=1e-9"]).handoff.start_timeout_s == 1e-9
    assert load_config(None, ["model.name=e5"]).model.name == "e5"


def test_an_empty_name_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match=r"CONFIG: must be a YAML file or a bundled name \(.*demo.*\), got ''"):
        load_config("")


def test_a_missing_file_names_itself_and_the_bundled_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*demo"):
        load_config("nowhere")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ([], "needs GPUs on both sides, set attention.num_gpus above 0 or use auto, shm, tcp or gloo"),
        (["attention.num_gpus=0.5"], "needs GPUs on both sides, set ffn.num_gpus above 0"),
        (
            ["attention.num_gpus=1", "ffn.colocated=true"],
            "must not be with ffn.colocated, where nothing is handed over; use auto",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["ipc", "nccl"])
def test_links_between_devices_want_devices(kind: str, overrides: list[str], reason: str) -> None:
    config = load_config(None, [f"handoff.kind={kind}", *overrides])
    with pytest.raises(ConfigError, match=re.escape(f"handoff.kind: {kind} {reason}")):
        check_supported(config)
    check_supported(load_config(None, [f"handoff.kind={kind}", "attention.num_gpus=0.5", "ffn.num_gpus=0.5"]))


def test_with_links_between_devices_nobody_learns_how_many_micro_batches_pay() -> None:
    shapes = [Shape.of(load_config(None, [f"handoff.kind={kind}"])) for kind in ("auto", "ipc")]
    assert [shape.epoch(1).adaptive for shape in shapes] == [True, False]
    assert shapes[1].epoch(1).micro_batches == 4


def test_gpus_may_be_asked_for() -> None:
    check_supported(load_config(None, ["attention.num_gpus=1", "ffn.num_gpus=0.5"]))


def test_scales_are_for_keys_and_values_in_e4m3() -> None:
    asked = ["attention.num_gpus=1", "attention.kv_cache.value_scale=0.5"]
    with pytest.raises(ConfigError, match=r"^attention\.kv_cache\.value_scale: needs attention\.kv_cache\.dtype: fp8, got auto$"):
        check_supported(load_config(None, asked))
    check_supported(load_config(None, [*asked, "attention.kv_cache.dtype=fp8"]))


def test_blocks_of_keys_on_a_gpu_are_powers_of_two() -> None:
    asked = ["attention.num_gpus=1", "ffn.num_gpus=1"]
    with pytest.raises(ConfigError, match=r"^attention\.kv_cache\.block_size: must be a power of two on a GPU, got 17$"):
        check_supported(load_config(None, [*asked, "attention.kv_cache.block_size=17"]))
    check_supported(load_config(None, [*asked, "attention.kv_cache.block_size=16"]))
    check_supported(load_config(None, ["attention.kv_cache.block_size=17"]))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["attention.kv_cache.dtype=fp8"], r"^attention\.kv_cache\.dtype: fp8 needs a GPU, set attention\.num_gpus above 0"),
        (["ffn.expert_dtype=fp8"], r"^ffn\.expert_dtype: fp8 needs a GPU, set ffn\.num_gpus above 0 or use auto$"),
        (["ffn.expert_dtype=fp8", "ffn.colocated=true", "ffn.num_gpus=1"], r"set attention\.num_gpus above 0"),
        (["attention.projection_dtype=fp8"], r"^attention\.projection_dtype: fp8 needs a GPU, set attention\.num_gpus above 0"),
        (["ffn.dense_dtype=fp8"], r"^ffn\.dense_dtype: fp8 needs a GPU, set ffn\.num_gpus above 0 or use auto$"),
        (
            ["ffn.dense_dtype=fp8", "ffn.num_gpus=1", "attention.shared_expert=true"],
            r"^ffn\.dense_dtype: .* set attention\.num_gpus",
        ),
    ],
)
def test_what_only_gpus_do_is_refused_without_one(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_supported(load_config(None, overrides))
    check_supported(load_config(None, [*overrides, "attention.num_gpus=1", "ffn.num_gpus=1"]))


@pytest.mark.parametrize("key", ["tensor_parallel", "expert_parallel"])
def test_a_colocated_cluster_has_no_ffn_ranks_to_cut(key: str) -> None:
    assert load_config(None, ["ffn.colocated=true"]).ffn.ranks == 0
    with pytest.raises(ConfigError, match=rf"ffn\.{key}: 2 must be 1 with ffn\.colocated"):
        load_config(None, ["ffn.colocated=true", f"ffn.{key}=2"])


def test_a_colocated_cluster_has_no_shared_experts_to_move() -> None:
    with pytest.raises(ConfigError, match=r"attention\.shared_expert: must not be true with ffn\.colocated"):
        load_config(None, ["ffn.colocated=true", "attention.shared_expert=true"])


def test_pace_is_linear() -> None:
    pace = Pace(base_us=10, per_row_us=2, per_context_token_us=0.5)
    assert pace.duration_us(rows=3, context_tokens=4) == 18


def test_the_model_directory_is_bundled_or_must_hold_a_checkpoint(tmp_path: Path) -> None:
    assert model_directory(Model()).name == "model"
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        model_directory(Model(path=str(tmp_path)))
    (tmp_path / "config.json").touch()
    assert model_directory(Model(path=str(tmp_path))) == tmp_path
    with pytest.raises(ConfigError, match=r"model\.path: /nowhere is no directory"):
        model_directory(Model(path="/nowhere"))


def test_a_bound_of_one_role_leaves_the_other_s() -> None:
    bounds = parse_config({"autoscaling": {"min": {"attention": 2}, "max": {"ffn": 8}}}).autoscaling
    assert (bounds.min.attention, bounds.min.ffn, bounds.max.attention, bounds.max.ffn) == (2, 1, 4, 8)


def test_a_serve_file_is_read_as_what_it_deploys(tmp_path: Path) -> None:
    demo = Path(__file__).parent.parent / "configs" / "serve" / "demo.yaml"
    config = load_deployed(demo, ["server.port=9000"])
    assert (config.attention.labels, config.ffn.labels) == ({"pool": "attention"}, {"pool": "ffn"})
    assert (config.server.host, config.server.port, config.placement.wait_for_nodes_s) == ("0.0.0.0", 9000, 600)
    moved = tmp_path / "moved.yaml"
    moved.write_text(demo.read_text().replace("port: 8000", "port: 8123"))
    assert load_deployed(moved).server.port == 8123
    assert load_deployed("demo") == load_config("demo")


@pytest.mark.parametrize(
    ("applications", "said"),
    [
        ([], "applications: must hold one with import_path: actors.ingress:app, got 0"),
        ([{"import_path": "other:app"}], "applications: must hold one with import_path: actors.ingress:app, got 0"),
        ([{"import_path": "actors.ingress:app"}] * 2, "got 2"),
        ([{"import_path": "actors.ingress:app", "args": [1]}], "args: must be a mapping of keys"),
        ([{"import_path": "actors.ingress:app", "args": {"ffn.lables": "{}"}}], "did you mean ffn.labels"),
    ],
)
def test_what_a_serve_file_must_hold(applications: object, said: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": applications}))
    with pytest.raises(ConfigError) as caught:
        load_deployed(file)
    assert said in str(caught.value)
