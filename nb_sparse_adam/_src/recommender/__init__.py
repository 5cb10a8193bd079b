# SPDX-License-Identifier: Apache-2.0
"""What `nb_sparse_adam.recommender` shows, and what it is made of."""
