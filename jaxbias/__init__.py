"""jaxbias: debiasing and unlearning in language models with JAX. `python -m jaxbias --help` lists the verbs."""
