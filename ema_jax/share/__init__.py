"""A finished study for others: tables, logs for Inspect, adapters on the Hub."""
