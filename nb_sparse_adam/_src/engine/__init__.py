"""Compiled code, and what it needs: kernels, threads, memory of tables."""
