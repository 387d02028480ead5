"""What each command does: `add_parser` says what it takes, `run` returns the exit code."""
