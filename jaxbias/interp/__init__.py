"""Activation patching, embedding interpretation and steering go here; sites and edits are in `models/layers.py`."""
