"""Pure loss functions; importing the package registers them all."""

from jaxbias.losses import likelihood, preference, unlearning  # noqa: F401
