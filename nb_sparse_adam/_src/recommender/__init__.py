"""What `nb_sparse_adam.recommender` shows, and what it is made of."""
