"""Generation: prefill and cached decode."""
