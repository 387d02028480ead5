"""One attention and one FFN process without Ray: the real step loops, joined by a mesh, or each alone on recorded inputs."""
