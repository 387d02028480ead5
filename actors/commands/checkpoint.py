"""`afd-ray checkpoint`: writes random checkpoints, shows what is in one, says what is wrong with one."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.commands.arguments import add_json, integer
from actors.commands.progress import ProgressLine

if TYPE_CHECKING:
    from afd_ray.models.config import ModelConfig

DIRECTORY_HELP = "a directory in Hugging Face layout, or demo, the bundled model"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("checkpoint", help="make, inspect and verify checkpoints")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    init = actions.add_parser("init", help="write a checkpoint with random weights")
    init.add_argument(
        "preset", metavar="PRESET", help="step3-tiny, step3-92m, or step3 (a dry run: counts parameters, writes nothing)"
    )
    init.add_argument("directory", nargs="?", metavar="DIR", help="a new or empty directory")
    init.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of the weights (default 0)")
    init.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the preset's")
    init.add_argument(
        "--fp8", action="store_true", help="weights in e4m3 with a scale for each 128 x 128, as DeepSeek-V3's layout has them"
    )
    add_json(init)
    init.set_defaults(run=run_init)
    inspect = actions.add_parser("inspect", help="shape, parameters, and bytes of each role")
    inspect.add_argument("directory", metavar="DIR", help=DIRECTORY_HELP)
    add_json(inspect)
    inspect.set_defaults(run=run_inspect)
    verify = actions.add_parser("verify", help="every fault, one line each; exit 1 if there is one")
    verify.add_argument("directory", metavar="DIR", help=DIRECTORY_HELP)
    add_json(verify)
    verify.set_defaults(run=run_verify)


def run_init(args: argparse.Namespace) -> int:
    from afd_ray.models.config import DTYPES
    from afd_ray.models.presets import DRY_RUN_ONLY, PRESETS, random_tensors
    from afd_ray.models.scaled import scaled_tensors
    from afd_ray.models.shards import write_checkpoint

    if args.preset not in PRESETS:
        raise ValueError(f"PRESET: must be one of {', '.join(PRESETS)}, got {args.preset!r}")
    config = PRESETS[args.preset]
    config = replace(config, dtype=DTYPES[args.dtype]) if args.dtype else config
    config = replace(config, scaled=args.fp8)
    if args.preset in DRY_RUN_ONLY:
        print(f"{args.preset} is too large to write here: nothing was written", file=sys.stderr)
    else:
        directory = _empty_directory(args.directory)
        progress = ProgressLine(f"writing {directory}:")
        tensors = random_tensors(config, args.seed, progress)
        write_checkpoint(directory, config, scaled_tensors(tensors) if args.fp8 else tensors)
        progress.finish()
    _print_description(describe(config), args.as_json)
    return 0


def _empty_directory(name: str | None) -> Path:
    if name is None:
        raise ValueError("DIR: missing, name a new or empty directory")
    directory = Path(name)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"DIR: must be a new or empty directory, {name} is not")
    return directory


def run_inspect(args: argparse.Namespace) -> int:
    from afd_ray.models.checkpoint import Checkpoint, digest

    checkpoint = Checkpoint.open(existing_directory(args.directory))
    checkpoint.require_sound()
    files = {stored.file for stored in checkpoint.tensors.values()}
    stored_bytes = sum(stored.end - stored.start for stored in checkpoint.tensors.values())
    described = describe(checkpoint.config)
    described |= {"files": len(files), "stored_bytes": stored_bytes, "digest": f"{digest(checkpoint):016x}"}
    _print_description(described, args.as_json)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from afd_ray.models.checkpoint import Checkpoint, file_findings, verify

    directory = existing_directory(args.directory)
    findings = [*file_findings(directory), *tokenizer_findings(directory)]
    tensors = 0
    if not findings:
        checkpoint = Checkpoint.open(directory)
        progress = ProgressLine(f"reading {directory}:")
        tensors, findings = len(checkpoint.tensors), list(verify(checkpoint, progress))
        progress.finish()
    if args.as_json:
        print(json.dumps({"directory": str(directory), "tensors": tensors, "findings": findings}, indent=2))
    else:
        print("\n".join(findings) if findings else f"{directory}: sound, {tensors} tensors")
    return 1 if findings else 0


def tokenizer_findings(directory: Path) -> list[str]:
    """What is wrong with the tokenizer's files; nothing where there are none."""
    from afd_ray.text import Tokenizer, TokenizerError

    try:
        Tokenizer.from_directory(directory)
    except TokenizerError as error:
        return [str(error)]
    return []


def existing_directory(name: str) -> Path:
    from afd_ray.config import BUNDLED_MODEL, Model, model_directory

    directory = model_directory(Model()) if name == BUNDLED_MODEL else Path(name)
    if not directory.is_dir():
        raise FileNotFoundError(f"DIR: {name} is no directory, give one in Hugging Face layout or {BUNDLED_MODEL}")
    return directory


def describe(config: "ModelConfig") -> dict[str, Any]:
    """A model's shape, its parameters by part, and the bytes that each role loads."""
    from afd_ray.models.layout import count_parameters

    counts = count_parameters(config)
    shape = {key: value for key, value in config.to_dict().items() if isinstance(value, int | float | str | bool)}
    return {
        "shape": shape,
        "parameters": counts.parts
        | {
            "attention_per_layer": counts.attention_per_layer,
            "expert": counts.expert,
            "dense_per_layer": counts.dense_per_layer,
            "attention_side": counts.attention_side,
            "ffn_side": counts.ffn_side,
            "activated": counts.activated,
            "total": counts.total,
        },
        "bytes": {
            "attention": counts.attention_side * config.dtype.itemsize,
            "ffn": counts.ffn_side * config.dtype.itemsize,
        },
    }


def _print_description(described: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(described, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, values in described.items():
        if not isinstance(values, dict):
            console.print(f"{title}: {values}")
            continue
        table = Table(title=title, title_justify="left", show_header=False)
        for key, value in values.items():
            grouped = isinstance(value, int) and not isinstance(value, bool) and title != "shape"
            table.add_row(key, f"{value:,}" if grouped else str(value))
        console.print(table)
