# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: an optimizer, or tables of ids, in a folder that is whole at every moment."""

from nb_sparse_adam._src.checkpoint.api import compact, load, restore, save

__all__ = ["compact", "load", "restore", "save"]
