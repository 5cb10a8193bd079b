# SPDX-License-Identifier: Apache-2.0
"""Compiled code, and what it needs: kernels, threads, memory of tables."""
