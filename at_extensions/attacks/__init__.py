"""Attacks that torchattacks lacks, and the context in which attacks run."""
