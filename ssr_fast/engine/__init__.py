"""The training engine: trainer, optimiser, checkpoints, metrics, guard."""
