"""Federated learning: rounds, aggregators, and a classifier that is trained by a federation."""
