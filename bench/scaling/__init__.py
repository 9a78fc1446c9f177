"""What a run on more GPUs may take: a model, computed from one GPU's step, never a measurement."""
