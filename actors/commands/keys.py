"""`afd-ray keys`: makes, lists and revokes the API keys of a file that a server reads."""

import argparse
import json
import os
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.commands.arguments import add_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("keys", help="make, list and revoke API keys; a running server follows the file")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="make a key: it is printed once, the file keeps its hash")
    add.add_argument(
        "file", metavar="FILE", type=Path, help="server.api_keys_file or server.admin_keys_file; made where there is none"
    )
    add.add_argument("--name", metavar="NAME", help="of its holder, to revoke it by (default: drawn)")
    add.set_defaults(run=run_add)
    listing = actions.add_parser("list", help="names and days; never the keys")
    revoke = actions.add_parser("revoke", help="take a key out")
    for action, run in ((listing, run_list), (revoke, run_revoke)):
        action.add_argument("file", metavar="FILE", type=Path)
        action.set_defaults(run=run)
    revoke.add_argument("name", metavar="NAME", help="as `list` shows it")
    for action in (add, listing, revoke):
        add_json(action)


def run_add(args: argparse.Namespace) -> int:
    from afd_ray import api_keys

    if not args.file.absolute().parent.is_dir():
        raise ValueError(f"FILE: {args.file.parent} is no directory")
    text = _text(args.file) if args.file.exists() else ""
    name = args.name or f"key-{secrets.token_hex(4)}"
    api_keys.check_name(name)
    if any(known.name == name for known in api_keys.parse(text, str(args.file))):
        raise ValueError(f"--name: {args.file} has a key of the name {name} already")
    key = api_keys.key_of(secrets.token_bytes(api_keys.KEY_BYTES))
    _write(args.file, api_keys.with_key(text, key, name, time.strftime("%Y-%m-%d")))
    if args.as_json:
        print(json.dumps({"name": name, "key": key}))
        return 0
    print(f"{args.file} holds the hash of {name}'s key; the key itself is shown here and nowhere else:", file=sys.stderr)
    print(key)
    return 0


def run_list(args: argparse.Namespace) -> int:
    from afd_ray import api_keys

    keys = api_keys.parse(_text(args.file), str(args.file))
    if args.as_json:
        print(json.dumps([{"name": key.name, "added": key.added, "plain_text": key.is_plain} for key in keys], indent=2))
        return 0
    for key in keys:
        print(f"{key.name}  {key.added or '-'}{'  in plain text: add another, then revoke this one' if key.is_plain else ''}")
    return 0


def run_revoke(args: argparse.Namespace) -> int:
    from afd_ray import api_keys

    text = api_keys.without_key(_text(args.file), args.name)
    _write(args.file, text)
    left = len(api_keys.parse(text, str(args.file)))
    if args.as_json:
        print(json.dumps({"name": args.name, "left": left}))
        return 0
    print(
        f"{args.name} is revoked, {left} left"
        + ("" if left else ": a running server lets nobody in, and none starts with this file")
    )
    return 0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"FILE: {file} must be UTF-8 text, got a wrong byte at {error.start}") from None


def _write(file: Path, text: str) -> None:
    """In one step, so that a server never reads half of it; to be read by its owner alone, or as it was before."""
    before = file.stat() if file.exists() else None
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
            stream.write(text)
            if before is not None:
                os.fchmod(stream.fileno(), before.st_mode & 0o777)
                with suppress(PermissionError):
                    os.fchown(stream.fileno(), before.st_uid, before.st_gid)
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
