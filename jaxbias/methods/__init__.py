"""A published method is a data recipe, its losses and, where it has one, its controller, one file each. No jax here."""

from jaxbias.methods import baselines, biasunlearn, cda, contrastive, mabel  # noqa: F401
from jaxbias.methods.registry import METHODS, get, recipe, variant
from jaxbias.methods.remedies import remedied

__all__ = ["METHODS", "get", "recipe", "remedied", "variant"]
