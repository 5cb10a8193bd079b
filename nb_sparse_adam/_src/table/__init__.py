# SPDX-License-Identifier: Apache-2.0
"""Tables whose rows are named by ids that nobody knew before: `EmbeddingTable`.

An index of ids lies in front of the engine's table, whose rows are records that hold parameters, moments and
counts side by side (`records.py`). What steps do is the engine's; what is here finds rows, makes them, and
lets them go.
"""
