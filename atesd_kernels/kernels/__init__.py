"""Only `@triton.jit` functions live here; the host side is in `triton_chunked.py` and `triton_tiled.py`."""
