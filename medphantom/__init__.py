"""Medical images that are drawn by a program."""
