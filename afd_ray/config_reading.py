"""Configuration text into plain values, and what is wrong with them into one line."""

import difflib
import re
import typing
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

MAX_FILE_BYTES = 1 << 20
APPLICATION = "actors.ingress:app"
"""The import path of our Serve application."""


class ConfigError(ValueError):
    """One line: the key or argument, its value and what is allowed."""


def bundled_names() -> list[str]:
    """The names of the configurations that are installed with the package."""
    names = (entry.name for entry in resources.files("configs").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def read_source(source: str | Path | None) -> tuple[Any, str]:
    if source is None:
        return {}, "configuration"
    if not str(source):
        raise ConfigError(f"CONFIG: must be a YAML file or a bundled name ({', '.join(bundled_names())}), got ''")
    path = Path(source)
    if path.is_file():
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes, not a configuration")
        return _mapping(_parse_yaml(path.read_bytes(), str(path))), str(path)
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory, expected a YAML file")
    name = str(source).removesuffix(".yaml")
    if name in bundled_names():
        file = resources.files("configs") / f"{name}.yaml"
        return _mapping(_parse_yaml(file.read_bytes(), f"configs/{name}.yaml")), f"configs/{name}.yaml"
    raise ConfigError(f"{source}: no such file, and no bundled configuration of that name ({', '.join(bundled_names())})")


def of_application(raw: dict[str, Any], origin: str) -> tuple[str | None, list[str]]:
    """What a file for `serve deploy` deploys: the source in our application's args (None: none), and the overrides there, Serve's host and port first.

    Raises ConfigError in one line where it does not hold one application of ours.
    """
    applications = raw["applications"] if isinstance(raw["applications"], list) else []
    ours = [one for one in applications if isinstance(one, dict) and one.get("import_path") == APPLICATION]
    if len(ours) != 1:
        raise ConfigError(f"{origin}: applications: must hold one with import_path: {APPLICATION}, got {len(ours)}")
    args, listens = ours[0].get("args") or {}, raw.get("http_options") or {}
    for name, value in (("args", args), ("http_options", listens)):
        if not isinstance(value, dict):
            raise ConfigError(f"{origin}: {name}: must be a mapping of keys, got {shown(value)}")
    own = [f"server.{key}={listens[key]}" for key in ("host", "port") if key in listens]
    return args.get("config"), own + overrides_of(args)


def overrides_of(args: dict[str, Any]) -> list[str]:
    """The args of our Serve application, but for `config`, as `--set` takes them."""
    return [f"{key}={value}" for key, value in args.items() if key != "config"]


def _mapping(raw: Any) -> Any:
    """An empty file parses as None."""
    return {} if raw is None else raw


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys in silence: here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(getattr(key_node, "value", ""))
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes a number such as 1e-9, without a point, for text.
_UniqueKeyLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+\Z"), list("-+0123456789"))


def _parse_yaml(content: bytes, origin: str) -> Any:
    try:
        raw = yaml.load(content.decode("utf-8"), _UniqueKeyLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin}: not valid UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{origin}{line}: {' '.join((error.problem or 'not valid YAML').split())}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{origin}: {' '.join(str(error).split())}") from None
    return raw


def apply_override(raw: Any, override: str) -> None:
    try:
        override.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--set: {override!r} must be valid UTF-8") from None
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set: {override!r} must be key.path=value")
    if not isinstance(raw, dict):
        return  # parse_config says what is wrong with the file
    for depth, part in enumerate(parts[:-1], start=1):
        if not isinstance(raw.setdefault(part, {}), dict):
            if raw[part] is not None:
                raise ConfigError(f"--set: {key}: {'.'.join(parts[:depth])} is {shown(raw[part])}, not a section")
            raw[part] = {}
        raw = raw[part]
    raw[parts[-1]] = _parse_yaml(text.encode(), f"--set {key}") if text.strip() else ""


def refuse_unknown_keys(schema: type[BaseModel], raw: dict[Any, Any], origin: str = "") -> None:
    """Raises ConfigError for the first key that `schema` lacks, with the nearest that it has; `origin`: the file it stands in."""
    try:
        _refuse_unknown_keys(schema, schema, raw, ())
    except ConfigError as error:
        raise ConfigError(f"{origin}: {error}" if origin else str(error)) from None


def _refuse_unknown_keys(schema: type[BaseModel], section: type[BaseModel], raw: dict[Any, Any], path: tuple[str, ...]) -> None:
    for key, value in raw.items():
        if key not in section.model_fields:
            raise ConfigError(f"{'.'.join((*path, str(key)))}: unknown key, {_suggestion(schema, section, str(key), path)}")
        inner = _section_of(section.model_fields[key].annotation)
        if inner is not None and isinstance(value, dict):
            _refuse_unknown_keys(schema, inner, value, (*path, key))


def _suggestion(schema: type[BaseModel], section: type[BaseModel], key: str, path: tuple[str, ...]) -> str:
    known = list(section.model_fields)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {'.'.join((*path, close[0]))}?"
    everywhere = list(_all_keys(schema, ()))
    elsewhere = [name for name in everywhere if name.rsplit(".", 1)[-1] == key]
    if elsewhere:
        return f"did you mean {elsewhere[0]}?"
    return f"the keys there are {', '.join(known)}"


def _all_keys(section: type[BaseModel], path: tuple[str, ...]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield ".".join((*path, name))
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, (*path, name))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def one_line(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first failure: its key, its value, and what the alternatives of that key allow."""
    details = error.errors(include_url=False)
    first = details[0]
    path = _key_path(first["loc"], schema)
    allowed = [_allowed(detail) for detail in details if _key_path(detail["loc"], schema) == path]
    if first["type"] == "missing":
        return f"{path}: missing, it has no default"
    if first["type"] == "extra_forbidden":
        return f"{path}: unknown key"
    return f"{path}: must be {' or '.join(dict.fromkeys(allowed))}, got {shown(first['input'])}"


def _key_path(loc: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """`loc` without the names that pydantic adds for the members of a union."""
    parts: list[str] = []
    section: type[BaseModel] | None = schema
    for part in loc:
        if section is None:
            break
        parts.append(str(part))
        if isinstance(part, int):
            continue  # of a list of that section
        field = section.model_fields.get(str(part))
        section = _section_of(field.annotation) if field else None
    return ".".join(parts) or "configuration"


_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_KINDS = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "non-empty text",
    "string_pattern_mismatch": "a lower-case name",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
}


def _allowed(detail: Any) -> str:
    """`detail` is one entry of ValidationError.errors()."""
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        bound = context[name]
        return f"{words} {bound}" if isinstance(bound, int) else f"{words} {bound:g}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    return _KINDS.get(kind, str(detail["msg"]))


def shown(value: object) -> str:
    """`value` as it is written in YAML, short."""
    text = {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
