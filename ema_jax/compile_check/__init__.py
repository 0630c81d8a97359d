"""What running on more than one device asks for: topologies, programs for them, and their cost."""
