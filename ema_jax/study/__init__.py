"""A study: its stages, its folder, its results."""
