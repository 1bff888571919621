"""Pure loss functions; importing the package registers them all."""

from jaxbias.losses import contrastive, likelihood, preference, sentence_pairs, unlearning  # noqa: F401
