"""The embedded models: a synthetic corpus, how they are trained on it, and their checkpoints."""

from pathlib import Path

CHECKPOINTS = Path(__file__).parent / "checkpoints"
