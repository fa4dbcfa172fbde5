"""A small GPT on the source of Python's standard library: the parts of `train_lm.py`."""
