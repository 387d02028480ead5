"""The OpenAI-compatible HTTP interface, over any backend that turns requests into tokens."""
