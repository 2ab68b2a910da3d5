"""Distillation from a teacher: its outputs, what its layers compute, and where it looks."""
