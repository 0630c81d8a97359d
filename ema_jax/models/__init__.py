"""One decoder for four families, its checkpoints, adapters and shardings."""
