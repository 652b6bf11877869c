"""Plumbing that a reader of the training scripts can skip."""
