"""Notebook 02: FedDetect."""
