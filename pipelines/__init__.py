"""Sampling, metrics, statistics and reports, and the shipped tiny models."""
