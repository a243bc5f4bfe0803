"""Measurements of a given model."""
