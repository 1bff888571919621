"""Pure loss functions; importing the package registers them all."""

from jaxbias.losses import (  # noqa: F401
  collapse,
  contrastive,
  debiasers,
  likelihood,
  preference,
  remedies,
  sentence_pairs,
  unlearning,
)  # fmt: skip
