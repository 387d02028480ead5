"""The bodies that clients send, and what they mean to the engine."""

import json
import math
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from actors.http.errors import bad_request
from afd_ray.request import MAX_LOGPROBS, MAX_STOP_SEQUENCES, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
MAX_CHOICES = 1024
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_QUOTED_CHARACTERS = 60


def _described(**bounds: Any) -> Any:
    """For the OpenAPI document alone: SamplingParams, or the code here, refuses what is out of range, in a line of its own."""
    return Field(json_schema_extra=bounds)


PositiveInt = Annotated[int, _described(minimum=1)]
Penalty = Annotated[float, _described(minimum=-2, maximum=2)]
Share = Annotated[float, _described(minimum=0, maximum=1)]
LogprobCount = Annotated[int, _described(minimum=0, maximum=MAX_LOGPROBS)]
StopText = Annotated[str, _described(minLength=1)]
_TOKEN_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1},
                _TOKEN_IDS,
                {"type": "array", "items": _TOKEN_IDS, "minItems": 1},
            ]
        }
    ),
]
"""Text, list of texts, token ids, or lists of token ids: `parse_prompts` reads it."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool | None = None


class GenerationBody(BaseModel):
    """What completions and chats have in common. None means the default; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")
    model: str | None = None
    n: Annotated[int, _described(minimum=1, maximum=MAX_CHOICES)] | None = None
    max_tokens: PositiveInt | None = None
    temperature: Annotated[float, _described(minimum=0, maximum=100)] | None = None
    top_p: Annotated[float, _described(exclusiveMinimum=0, maximum=1)] | None = None
    top_k: Annotated[int, _described(minimum=-1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, _described(exclusiveMinimum=0, maximum=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, _described(minimum=-(2**63), maximum=2**64 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], _described(maxItems=MAX_STOP_SEQUENCES)] | None = None
    stop_token_ids: list[Annotated[int, _described(minimum=0)]] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    timeout_s: Annotated[float, _described(exclusiveMinimum=0)] | None = None
    """From request to last token; what is not over then is given up."""

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def limits_tokens(self) -> bool:
        """Whether the client asked for a number of tokens."""
        return self.max_tokens is not None

    def token_limit(self) -> int | None:
        """None: the rest of the context."""
        raise NotImplementedError

    def logprob_count(self) -> int | None:
        raise NotImplementedError

    def sampling(self) -> SamplingParams:
        """Raises ValueError naming the parameter that is out of range."""
        given = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(_is_unicode(text) for text in stop):
            raise bad_request("stop must be valid Unicode, got a lone surrogate", param="stop")
        return SamplingParams(
            max_tokens=self.token_limit(),
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.logprob_count(),
            **given,
        )


_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "ignore_eos",
)

_TEMPLATE_FIELDS = ("messages", "tools", "add_generation_prompt")


class CompletionBody(GenerationBody):
    model_config = ConfigDict(json_schema_extra={"required": ["prompt"]})
    prompt: Prompt = None
    logprobs: LogprobCount | None = None
    echo: Annotated[bool, _described(const=False)] | None = None

    def token_limit(self) -> int | None:
        explicit_null = self.max_tokens is None and "max_tokens" in self.model_fields_set
        return None if explicit_null else self.max_tokens if self.max_tokens is not None else DEFAULT_COMPLETION_TOKENS

    def logprob_count(self) -> int | None:
        return self.logprobs


class ContentPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    type: Annotated[str, _described(const="text")]
    text: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    role: Annotated[str, _described(enum=list(ROLES))]
    content: str | list[ContentPart] | None = None

    def for_template(self, index: int) -> dict[str, Any]:
        """Raises ApiError for a role that there is not, and for content that is missing or no text."""
        if self.role not in ROLES:
            name = f"messages.{index}.role"
            raise bad_request(f"{name} must be one of {', '.join(ROLES)}, got '{_quote(self.role)}'", param=name)
        if self.content is None and self.role != "assistant":
            name = f"messages.{index}.content"
            raise bad_request(f"{name} must be given with the role {self.role}", param=name)
        return {**(self.model_extra or {}), "role": self.role, "content": self._text(index)}

    def _text(self, index: int) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        for part in self.content:
            if part.type != "text" or part.text is None:
                name = f"messages.{index}.content"
                raise bad_request(f"{name} must be text, got a part of type '{_quote(part.type)}'", param=name)
        return "".join(part.text or "" for part in self.content)


class ChatBody(GenerationBody):
    messages: Annotated[list[Message], _described(minItems=1)]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    add_generation_prompt: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def limits_tokens(self) -> bool:
        return self.token_limit() is not None

    def token_limit(self) -> int | None:
        wanted = self.max_completion_tokens
        if wanted is not None and wanted < 1:
            raise bad_request(f"max_completion_tokens must be at least 1, got {wanted}", param="max_completion_tokens")
        return self.max_tokens if wanted is None else wanted

    def template_variables(self) -> dict[str, Any]:
        """What the chat template sees besides the messages; raises ApiError for a name that the body has a field for."""
        given = self.chat_template_kwargs or {}
        for name in _TEMPLATE_FIELDS:
            if name in given:
                raise bad_request(
                    f"chat_template_kwargs must not hold {name}: it is a field of the body", param="chat_template_kwargs"
                )
        return {**given, "tools": self.tools, "add_generation_prompt": self.add_generation_prompt is not False}

    def logprob_count(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs must come with logprobs: true", param="top_logprobs")
        if not self.logprobs:
            return None
        count = self.top_logprobs or 0
        if not 0 <= count <= MAX_LOGPROBS:
            raise bad_request(f"top_logprobs must be from 0 to {MAX_LOGPROBS}, got {count}", param="top_logprobs")
        return count


Body = TypeVar("Body", bound=GenerationBody)


def parse_body(raw: bytes, kind: type[Body]) -> Body:
    """Raises ApiError 400 for anything that is not a valid body of this kind."""
    value = parse_json(raw)
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from None
    if not 1 <= body.choices <= MAX_CHOICES:
        raise bad_request(f"n must be from 1 to {MAX_CHOICES}, got {body.n}", param="n")
    if body.timeout_s is not None and not 0 < body.timeout_s < math.inf:
        raise bad_request(f"timeout_s must be greater than 0, got {body.timeout_s:g}", param="timeout_s")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options must come with stream: true", param="stream_options")
    return body


def parse_json(raw: bytes) -> dict[str, Any]:
    """Strict: UTF-8 only, one object, no NaN or Infinity."""
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request(f"body must be valid UTF-8, got a wrong byte at position {error.start}") from None
    except RecursionError:
        raise bad_request("body must be JSON, got one nested too deeply") from None
    except ValueError as error:
        raise bad_request(f"body must be valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request("body must be a JSON object")
    return value


def parse_prompts(prompt: object) -> list[str] | list[list[int]]:
    """Text, list of texts, token ids, or lists of token ids; none of them empty."""
    match prompt:
        case str():
            prompts: list[Any] = [prompt]
        case [first, *_] if _is_integer(first):
            prompts = [prompt]
        case [_, *_]:
            prompts = list(prompt)
        case None:
            raise bad_request("prompt must be given", param="prompt")
        case []:
            raise bad_request("prompt must not be empty", param="prompt")
        case _:
            _refuse_prompt(prompt)
    if not all(isinstance(one, str) for one in prompts) and not all(_is_token_list(one) for one in prompts):
        _refuse_prompt(prompt)
    if not all(prompts):
        raise bad_request("prompt must not be empty", param="prompt")
    return prompts


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token_list(value: object) -> bool:
    return isinstance(value, list) and all(_is_integer(token) for token in value)


def _refuse_prompt(prompt: object) -> NoReturn:
    allowed = "text, a list of texts, a list of token ids, or a list of lists of token ids"
    raise bad_request(f"prompt must be {allowed}, got {_quote(json.dumps(prompt))}", param="prompt")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _explain(error: ValidationError) -> Exception:
    """The first thing wrong, in one line that names it."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = [str(part) for part in first["loc"]]
    param = ".".join(part for part in place if part not in ("str", "list[str]", "list[ContentPart]")) or None
    if first["type"] == "missing":
        return bad_request(f"{param} must be given", param=param)
    return bad_request(f"{param} is wrong: {first['msg']}, got {_quote(json.dumps(first['input'], default=str))}", param=param)


def _quote(text: str) -> str:
    return text if len(text) <= _QUOTED_CHARACTERS else text[:_QUOTED_CHARACTERS] + "..."
