"""Rows, sources and packing. No jax at module top."""
