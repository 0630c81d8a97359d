"""Concepts in the residual stream: vectors, entanglement, erasure and the forecast they give.

Nothing is re-exported here: `entanglement`, `erasure` and `forecast` are modules, each with a
function of its name.
"""
