"""Procedures that train models to learn something."""
