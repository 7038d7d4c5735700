"""Turn a general language model into a domain expert on one GPU: self-specialization, end to end."""

__version__ = "0.1.0"
