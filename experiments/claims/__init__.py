"""Notebook 99: the claims."""
