"""The decoder for all families: checkpoints, adapters and shardings."""
