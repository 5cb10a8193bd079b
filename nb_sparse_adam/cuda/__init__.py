"""`nb_sparse_adam.SparseAdam` on a GPU: nothing here is called by users.

Tables that are on a GPU bring the optimizer here by themselves; it needs the package numba-cuda.
"""

from nb_sparse_adam.extras import require

require("numba_cuda", "cuda", "a table on a GPU")
