"""What `nb_sparse_adam.checkpoint` shows, and what it is made of."""
