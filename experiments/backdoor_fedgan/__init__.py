"""Notebook 01: the backdoor attack on a federated GAN."""
