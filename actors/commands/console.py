"""Where the commands' tables are printed."""

from rich.console import Console

WIDTH = 132
"""Where the output is no terminal."""


def table_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)
