"""Engines beside each other: every one runs in a process and an environment of its own, behind one protocol."""
