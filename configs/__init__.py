"""How much: the configuration files."""
