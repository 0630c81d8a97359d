"""Refusal: verdicts by judges, validity of responses, and refusal scores."""
