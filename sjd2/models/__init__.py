"""Image models of several families behind one class, their weights and key-value cache."""
