"""Training: which texts a step reads, the step itself, the loop around it, checkpoints, the reference cache."""
