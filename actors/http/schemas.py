"""The JSON of admin calls and of every answer, as the OpenAPI document describes it; an answer may hold more than is said here."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TRACE_STEPS = 10_000
MAX_RANKS = 4096
"""Of a role, as in the configuration."""
MAX_TIMEOUT_S = 86_400

FinishReason = Literal["stop", "length"]
Ranks = Annotated[int, Field(ge=1, le=MAX_RANKS)]


class ScaleBody(BaseModel):
    """Ranks wanted, of at least one role; what is not given stays as it is. Or `cancel` alone."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})
    attention: Ranks | None = None
    ffn: Ranks | None = None
    ffn_tensor_parallel: Ranks | None = None
    timeout_s: Annotated[int, Field(ge=1, le=MAX_TIMEOUT_S)] | None = None
    """After which the resize is rolled back."""
    cancel: Literal[True] | None = None
    """Roll back the resize in progress; answered with how it ended."""


class RebalanceBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TraceBody(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: Annotated[int, Field(ge=1, le=MAX_TRACE_STEPS)] | None = None


class ErrorDetail(BaseModel):
    message: str
    """One line."""
    type: str
    param: str | None
    """The field that is wrong."""
    code: str | None


class Error(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopScore(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatScore(TopScore):
    top_logprobs: list[TopScore]


class ChatLogprobs(BaseModel):
    content: list[ChatScore]
    refusal: str | None


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: str | None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    status: Literal["ok"]


class Ready(BaseModel):
    status: Literal["ready"]


class Quantiles(BaseModel):
    p50: float
    p95: float
    p99: float


class Actor(BaseModel):
    id: str
    rank: int | None
    node: str | None
    address: str | None
    pid: int | None
    placement_group: str
    state: Literal["starting", "running", "draining", "dead"]


class AttentionActor(Actor):
    """What an actor that does not answer has is null."""

    running: int | None
    waiting: int | None
    kv_used: int | None
    kv_total: int | None


class FFNActor(Actor):
    experts: list[int]


class Counts(BaseModel):
    attention: int
    ffn: int


class Resize(BaseModel):
    outcome: Literal["committed", "rolled_back", "refused"]
    reason: str | None
    pause_ms: float | None
    total_s: float


class Status(BaseModel):
    state: Literal["starting", "ready", "resizing", "recovering", "degraded", "stopping"]
    epoch: int
    model: str
    attention: list[AttentionActor]
    ffn: list[FFNActor]
    placement_groups: list[dict[str, Any]]
    tpot_ms: Quantiles | None
    ttft_ms: Quantiles | None
    stages_us: dict[str, float | None]
    waiting_for: str | None = None
    """What a change in progress cannot go on without."""
    last_resize: Resize | None


class RefusedResize(Error):
    """Of a resize that did not happen; the error alone where none was begun."""

    outcome: Literal["rolled_back", "refused"] | None = None
    reason: str | None = None
    pause_ms: float | None = None
    total_s: float | None = None


class Decisions(BaseModel):
    policy: str
    decisions: list[dict[str, Any]]


class Measured(BaseModel):
    epoch: int


class Placement(BaseModel):
    epoch: int
    experts: list[list[int]]
    """By FFN instance."""


class Trace(BaseModel):
    """In Chrome's trace format."""

    traceEvents: list[dict[str, Any]]
