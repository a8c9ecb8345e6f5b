"""Classifiers, autoencoders and a language model, trained on data of your own: `python -m examples.train --help`."""
