"""Harvest, objectives, training, and what training changed."""
