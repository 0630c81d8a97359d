"""A grid of studies that share their first stages, run by any number of processes."""
