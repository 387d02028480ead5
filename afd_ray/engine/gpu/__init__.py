"""The engine's part of a GPU: what a step is told, a micro-batch's passage, the room for keys and values."""
