"""Files, processes, progress and command lines: used by every package."""
