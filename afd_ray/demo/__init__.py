"""The small bundled model: its corpus, its training script, its weights."""
