"""Paper 1: the backdoor in a federated GAN, and the defences against it."""
