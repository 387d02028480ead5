"""What a deployment costs before it exists: shapes and accelerators in, ratio, memory, latency and price out. Pure; no torch, no Ray."""
