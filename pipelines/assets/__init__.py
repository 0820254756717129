"""Weights and model cards that ride in the package."""
