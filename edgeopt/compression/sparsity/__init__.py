"""Zeros in weights: which ones, and how training keeps them."""
