"""Everything this project measures on one GPU, in stages of a few seconds to a minute. Start with `__main__.py`."""
