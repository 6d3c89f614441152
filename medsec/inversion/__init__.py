"""Paper 2: images from gradients, and the defences of gradients and images."""
