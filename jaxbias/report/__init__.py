"""Runs to tables and pictures. Reads files only: no jax, any laptop."""

from __future__ import annotations
