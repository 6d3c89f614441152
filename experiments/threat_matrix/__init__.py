"""Notebook 05: every defence against every attack."""
