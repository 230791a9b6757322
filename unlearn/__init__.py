"""Remove data from language models and show evidence a reader can check."""

__version__ = "0.1.0"
