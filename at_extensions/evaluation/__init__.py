"""Robust accuracy through AutoAttack."""
