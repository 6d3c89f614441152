"""Paper 3: adversarial examples, and training, pruning and attention against them."""
