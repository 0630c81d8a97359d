"""Compiles a study's programs for a TPU slice, without a TPU: memory, collectives, a time bound."""
