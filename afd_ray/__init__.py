"""What is computed: the model, the engine, the hand-off. Nothing here imports Ray."""
