"""Language models: shapes, layers, the scanned stack, checkpoints in, adapters."""
