# SPDX-License-Identifier: Apache-2.0
"""`nb_sparse_adam.SparseAdam` on a GPU: nothing here is called by users.

Tables that are on a GPU bring the optimizer here by themselves; it needs the package numba-cuda.

`device` has what differs between a GPU and the simulator of one. A step goes from `steps`, which knows who
waits for whom, through `launches`, which lays its gradients out as records and launches kernels, to the
kernels: `checks`, `grouping`, then, for each kind of table, `sums` and `kernels`. They read `records` by way
of `opening`. `ring` keeps the memory of steps, `guard` what an optimizer has refused, `table` the state.
"""

from nb_sparse_adam._src.extras import require

require("numba_cuda", "cuda", "a table on a GPU")
