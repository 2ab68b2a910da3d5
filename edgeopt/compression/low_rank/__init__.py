"""Layers as products of two smaller ones."""
