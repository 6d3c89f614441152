"""Notebook 00: cohort, federation and threat models."""
