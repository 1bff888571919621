"""Pure loss functions; importing the package registers them all."""

from jaxbias.losses import collapse, contrastive, likelihood, preference, sentence_pairs, unlearning  # noqa: F401
