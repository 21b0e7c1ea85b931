"""Decide which implementation of a chain of layers runs, say why, and run it."""
