"""The asv suite, made of the parts of `nb_sparse_adam.bench`. See README.md beside this file."""
