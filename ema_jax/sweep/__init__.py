"""Sweeps: a grid of studies that share what they can, worked on by any number of processes."""
