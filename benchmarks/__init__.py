"""How well: one question a file, with its bound and its peer."""
