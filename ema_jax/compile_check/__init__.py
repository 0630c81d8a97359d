"""Compiles a study's programs for TPUs or GPUs, without any: memory, collectives, a time bound."""
