# SPDX-License-Identifier: Apache-2.0
"""What `nb_sparse_adam.torch` shows, and what it is made of."""

from nb_sparse_adam._src.extras import require

require("torch", "torch", "nb_sparse_adam.torch")
