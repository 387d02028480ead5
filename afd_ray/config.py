"""The configuration of a cluster: YAML and overrides into frozen models, read in this one place."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from afd_ray.config_reading import ConfigError, apply_override, of_application, one_line, read_source, refuse_unknown_keys, shown

__all__ = ["Config", "ConfigError", "Pace", "check_supported", "load_config", "load_deployed", "model_directory", "parse_config"]

BUNDLED_MODEL = "demo"

Count = Annotated[int, Field(ge=1, le=4096)]
Microseconds = Annotated[float, Field(ge=0, le=60_000_000)]
Scale = Annotated[float, Field(ge=2.0**-64, le=2.0**64)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Dtype = Literal["auto", "float32", "bfloat16"]
CacheDtype = Literal["auto", "float32", "bfloat16", "fp8"]
WeightDtype = Literal["auto", "fp8"]
WireDtype = Literal["auto", "float32", "bfloat16", "fp8"]
LinkKind = Literal["auto", "shm", "tcp", "gloo", "ipc", "nccl"]


class Section(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Model(Section):
    path: str = Field(default=BUNDLED_MODEL, min_length=1)
    """`demo`, the bundled model, or a directory in Hugging Face layout."""
    name: str | None = Field(default=None, min_length=1)
    """What clients call it; None: the last part of the path."""
    dtype: Dtype = "auto"
    max_context: PositiveInt | None = None
    """Tokens of prompt and answer; None: what the model allows."""

    @property
    def served_name(self) -> str:
        return self.name or Path(self.path).absolute().name or self.path


class Pace(Section):
    """Stage-time profile: the stage computes its result, then waits until it has lasted this long."""

    base_us: Microseconds
    per_row_us: Microseconds = 0.0
    per_context_token_us: Microseconds = 0.0
    """Attention only."""

    def duration_us(self, rows: int, context_tokens: int = 0) -> float:
        """How long one layer of a micro-batch of `rows` rows, over `context_tokens` cached tokens in all, lasts."""
        return self.base_us + self.per_row_us * rows + self.per_context_token_us * context_tokens


class KVCache(Section):
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    """Tokens."""
    num_blocks: Literal["auto"] | Annotated[int, Field(ge=1, le=1 << 24)] = "auto"
    dtype: CacheDtype = "auto"
    """fp8: e4m3, on GPUs only."""
    key_scale: Scale | None = None
    """With fp8: keys are divided by it when they are written. None: the checkpoint's, of each layer, or 1."""
    value_scale: Scale | None = None
    """As key_scale, of values."""

    @property
    def tokens(self) -> int | None:
        """What one attention actor holds; None: not known before it looks at its memory."""
        return None if self.num_blocks == "auto" else self.num_blocks * self.block_size


class Attention(Section):
    replicas: Count = 2
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    labels: dict[str, str] = {}
    shared_expert: bool = False
    """Attention actors compute the shared experts, while the FFN ranks compute the routed ones."""
    pace: Pace | None = None
    projection_dtype: WeightDtype = "auto"
    """Of attention's projections. fp8: e4m3 with a scale for each block of 128 x 128, on GPUs only."""
    kv_cache: KVCache = KVCache()

    @property
    def quantises(self) -> bool:
        """Whether projections are held in e4m3."""
        return self.projection_dtype == "fp8"


class FFN(Section):
    tensor_parallel: Count = 1
    expert_parallel: Count = 1
    colocated: bool = False
    """No FFN ranks: every attention actor computes whole layers."""
    redundant_experts: Annotated[int, Field(ge=0)] = 0
    """Copies of experts in all instances together, beyond one of each."""
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    labels: dict[str, str] = {}
    pace: Pace | None = None
    dispatch: Literal["broadcast", "routed"] = "broadcast"
    expert_dtype: WeightDtype = "auto"
    """Of the routed experts' weights. fp8: e4m3 with a scale for each block of 128 x 128, on GPUs only."""
    dense_dtype: WeightDtype = "auto"
    """Of shared experts and dense layers, by whichever role they are computed. fp8: as `expert_dtype`."""

    @property
    def quantises(self) -> bool:
        """Whether routed experts are held in e4m3."""
        return self.expert_dtype == "fp8"

    @property
    def quantises_dense(self) -> bool:
        """Whether shared experts and dense layers are held in e4m3."""
        return self.dense_dtype == "fp8"

    @property
    def ranks(self) -> int:
        return 0 if self.colocated else self.tensor_parallel * self.expert_parallel


class Pipeline(Section):
    micro_batches: Literal["auto"] | Annotated[int, Field(ge=1, le=4)] = "auto"
    max_tokens_per_micro_batch: Annotated[int, Field(ge=1, le=65_536)] = 512
    max_running_requests: Annotated[int, Field(ge=1, le=65_536)] = 256
    """A attention actor."""
    cuda_graphs: bool = True
    """On GPUs, steps that only decode are captured when an actor loads, and replayed."""

    @property
    def most_decoding(self) -> int:
        """Rows of a micro-batch."""
        return min(self.max_tokens_per_micro_batch, self.max_running_requests)


class Handoff(Section):
    kind: LinkKind = "auto"
    wire_dtype: WireDtype = "auto"
    start_timeout_s: Seconds = 30.0

    @property
    def between_devices(self) -> Literal["ipc", "nccl"] | None:
        """The kind of links by which rows stay in device memory; None: they pass through host memory."""
        return self.kind if self.kind == "ipc" or self.kind == "nccl" else None


class Placement(Section):
    attention: Strategy = "SPREAD"
    ffn: Strategy = "PACK"
    separate_nodes: Literal["auto"] | bool = "auto"
    timeout_s: Seconds = 60.0
    wait_for_nodes_s: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    """For nodes that still join, or that Ray's autoscaler starts."""
    topology_label: str | None = Field(default=None, min_length=1)
    """Of nodes, as `rack`: all actors go where it has one value, if they fit so."""


class Failure(Section):
    detect_timeout_s: Seconds = 1.0
    """An actor that is silent for so long is lost; those who are left have four times as long to connect with each other."""
    request_timeout_s: Seconds | None = None
    """From request to last token, where the request itself gives no `timeout_s`."""
    drain_timeout_s: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """What requests in progress have to finish in when the server is told to stop, or to be fetched in from an attention actor that leaves."""


class Counts(Section):
    """How many ranks of each role."""

    attention: Count = 1
    ffn: Count = 1


class MostCounts(Counts):
    attention: Count = 4
    ffn: Count = 4


class Autoscaling(Section):
    policy: str = Field(default="fixed", pattern=r"^[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?$")
    """A built-in one, or `module:function`."""
    options: dict[str, float] = {}
    """The policy's own settings."""
    period_s: Seconds = 5.0
    tpot_target_ms: PositiveFloat = 50.0
    ttft_target_ms: PositiveFloat = 1000.0
    min: Counts = Counts()
    max: MostCounts = MostCounts()
    resize_deadline_s: Seconds = 600.0
    """A resize that a policy asked for is rolled back after that."""
    override_s: Annotated[float, Field(ge=0)] = 900.0
    """For so long policies leave alone what was set by hand."""


class Server(Section):
    host: str = Field(default="127.0.0.1", min_length=1)
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """0: any free port."""
    api_keys_file: str | None = None
    admin_keys_file: str | None = None
    max_queued_requests: Annotated[int, Field(ge=0)] = 1024
    max_requests_per_s: PositiveFloat | None = None
    """Of one key, or of one address where no key is asked for."""
    max_header_bytes: Annotated[int, Field(ge=1024)] = 65_536
    """Of a request's path and headers together."""
    max_body_bytes: PositiveInt = 1_048_576
    replicas: Count = 1


class Node(Section):
    """Machines of one kind."""

    actors: Count
    """That fit on them in all."""
    slowness: PositiveFloat = 1.0
    """How many times as long stages last there."""
    start_delay_s: NonNegativeFloat | None = None
    """None: as everywhere."""


class FailureAt(Section):
    at_s: NonNegativeFloat
    role: Literal["attention", "ffn"]


class Simulation(Section):
    """What `afd-ray simulate` needs to know beyond what a server does."""

    detail: Literal["rounds", "layers"] = "rounds"
    """rounds: a token of every sequence at a time, in closed form. layers: every layer of every micro-batch, as step loops do it; slow."""
    layers: PositiveInt | None = None
    """None: the model's."""
    profile: str | None = None
    """Measured stage times; None: `attention.pace` and `ffn.pace`."""
    transfer: Pace | None = None
    """With paces: both ways of one rank's rows."""
    ffn_scaling: Literal["paced", "shared"] = "paced"
    """With paces: paced FFN ranks last as long whatever their number, but for `ffn.dispatch: routed`; shared: ranks divide the work that the pace gives one."""
    kv_blocks: PositiveInt | None = None
    """Of each attention rank; None: `attention.kv_cache.num_blocks`, or 8,192."""
    start_delay_s: NonNegativeFloat = 60.0
    """From asking for an actor until it can load weights."""
    load_s: NonNegativeFloat = 5.0
    connect_s: NonNegativeFloat = 1.0
    switch_pause_ms: NonNegativeFloat = 100.0
    recover_s: NonNegativeFloat = 1.0
    """From a loss being known until those who are left go on."""
    nodes: list[Node] = []
    """Empty: as many as asked for, all alike."""
    failures: list[FailureAt] = []
    mean_hours_between_failures: PositiveFloat | None = None
    """Of one actor."""


class Config(Section):
    """Everything that a cluster is told."""

    model: Model = Model()
    attention: Attention = Attention()
    ffn: FFN = FFN()
    pipeline: Pipeline = Pipeline()
    handoff: Handoff = Handoff()
    placement: Placement = Placement()
    failure: Failure = Failure()
    autoscaling: Autoscaling = Autoscaling()
    server: Server = Server()
    simulation: Simulation = Simulation()

    @property
    def shares_gpus(self) -> bool:
        """Whether two actors may be on one GPU."""
        return min(self.attention.num_gpus, self.ffn.num_gpus) < 1

    def context_limit(self, model_limit: int) -> int:
        """Tokens of prompt and answer that a request may have at most; `model_limit`: what the model allows."""
        limits = (model_limit, self.model.max_context, self.attention.kv_cache.tokens)
        return min(limit for limit in limits if limit is not None)


def load_config(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, or a bundled one by name ("demo"; None: the defaults), with `key.path=value` overrides.

    Raises ConfigError in one line.
    """
    raw, origin = read_source(source)
    if isinstance(raw, dict):
        refuse_unknown_keys(Config, raw, origin)
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw, origin)


def load_deployed(source: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """As load_config, and also of a file for `serve deploy`: what its application comes to. Raises ConfigError in one line."""
    raw, origin = read_source(source)
    if not isinstance(raw, dict) or "applications" not in raw:
        return load_config(source, overrides)
    config, own = of_application(raw, origin)
    return load_config(config, [*own, *overrides])


def parse_config(raw: object, origin: str = "configuration") -> Config:
    """From parsed YAML; raises ConfigError in one line."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{origin}: must hold a mapping of sections, got {shown(raw)}")
    refuse_unknown_keys(Config, raw)
    try:
        config = Config.model_validate(_without_empty_sections(raw))
    except ValidationError as error:
        raise ConfigError(one_line(error, Config)) from None
    _check_bounds(config.autoscaling)
    _check_colocated(config)
    return config


def check_supported(config: Config) -> None:
    """Refuses, in one line, what the schema accepts and this version cannot do."""
    _check_devices(config)
    attention, ffn = config.attention, config.ffn
    if attention.kv_cache.dtype == "fp8" and not attention.num_gpus:
        raise ConfigError(
            "attention.kv_cache.dtype: fp8 needs a GPU, set attention.num_gpus above 0 or use auto, float32, bfloat16"
        )
    block_size = attention.kv_cache.block_size
    if attention.num_gpus and block_size & block_size - 1:
        raise ConfigError(f"attention.kv_cache.block_size: must be a power of two on a GPU, got {block_size}")
    for key in ("key_scale", "value_scale"):
        if getattr(attention.kv_cache, key) is not None and attention.kv_cache.dtype != "fp8":
            raise ConfigError(f"attention.kv_cache.{key}: needs attention.kv_cache.dtype: fp8, got {attention.kv_cache.dtype}")
    holder = "attention" if ffn.colocated else "ffn"
    needed = {
        ("attention.projection_dtype", "attention"): attention.quantises,
        ("ffn.expert_dtype", holder): ffn.quantises,
        ("ffn.dense_dtype", holder): ffn.quantises_dense,
        ("ffn.dense_dtype", "attention"): ffn.quantises_dense and attention.shared_expert,
    }
    for (key, role), is_asked in needed.items():
        if is_asked and not (attention if role == "attention" else ffn).num_gpus:
            raise ConfigError(f"{key}: fp8 needs a GPU, set {role}.num_gpus above 0 or use auto")


def model_directory(model: Model) -> Path:
    """Where the checkpoint lies; raises ConfigError when there is no such directory, or no checkpoint in it."""
    if model.path == BUNDLED_MODEL:
        return Path(str(resources.files("afd_ray.demo") / "model"))
    path = Path(model.path).expanduser()
    if not path.is_dir():
        raise ConfigError(f"model.path: {model.path} is no directory, give {BUNDLED_MODEL} or a directory in Hugging Face layout")
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"model.path: {model.path} holds no config.json, give {BUNDLED_MODEL} or a directory in Hugging Face layout"
        )
    return path


def _check_bounds(autoscaling: Autoscaling) -> None:
    for role in ("attention", "ffn"):
        low, high = getattr(autoscaling.min, role), getattr(autoscaling.max, role)
        if low > high:
            raise ConfigError(f"autoscaling.min.{role}: {low} must be at most autoscaling.max.{role}, {high}")


def _check_colocated(config: Config) -> None:
    ffn = config.ffn
    if ffn.colocated and config.attention.shared_expert:
        raise ConfigError("attention.shared_expert: must not be true with ffn.colocated: every attention actor holds every FFN")
    for key in ("tensor_parallel", "expert_parallel", "redundant_experts", "dispatch"):
        alone = FFN.model_fields[key].default
        if ffn.colocated and getattr(ffn, key) != alone:
            raise ConfigError(
                f"ffn.{key}: {getattr(ffn, key)} must be {alone} with ffn.colocated: every attention actor holds every FFN"
            )


def _check_devices(config: Config) -> None:
    kind = config.handoff.between_devices
    if kind is None:
        return
    if config.ffn.colocated:
        raise ConfigError(f"handoff.kind: {kind} must not be with ffn.colocated, where nothing is handed over; use auto")
    for role, gpus in (("attention", config.attention.num_gpus), ("ffn", config.ffn.num_gpus)):
        if not gpus:
            raise ConfigError(
                f"handoff.kind: {kind} needs GPUs on both sides, set {role}.num_gpus above 0 or use auto, shm, tcp or gloo"
            )


def _without_empty_sections(raw: dict[Any, Any]) -> dict[Any, Any]:
    """A section whose keys are all commented out parses as None: it means the defaults."""
    return {key: value for key, value in raw.items() if value is not None}
