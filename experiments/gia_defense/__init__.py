"""Notebook 03: gradient inversion and the defences against it."""
