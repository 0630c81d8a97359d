"""Prompts: domains, sources, the deny-list, splits."""
