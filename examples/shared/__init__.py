"""What the examples share. Each of them puts the folder above this one on its path."""
