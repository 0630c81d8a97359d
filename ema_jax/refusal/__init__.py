"""Refusals: who refused (judges), who could not be judged (validity), how many (scores)."""
