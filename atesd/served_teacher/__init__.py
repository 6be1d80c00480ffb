"""A teacher behind a vLLM server: what it is asked, what it may answer, and what the loss gets of it."""
