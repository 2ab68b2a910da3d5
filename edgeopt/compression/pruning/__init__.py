"""Structured pruning: what can be removed together, what it is worth, and its removal."""
