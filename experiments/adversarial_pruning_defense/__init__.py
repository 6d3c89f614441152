"""Notebook 04: adversarial examples and pruning."""
