# SPDX-License-Identifier: Apache-2.0
"""`nb_sparse_adam.parameter_server`: shards of tables, and who asks them."""
