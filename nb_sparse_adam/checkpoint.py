# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: an optimizer's tables, state and options in a folder that is whole at every moment."""

from nb_sparse_adam._src.checkpoint.saving import load, restore, save

__all__ = ["load", "restore", "save"]
