"""A judge behind an HTTP endpoint."""
