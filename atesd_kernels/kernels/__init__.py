"""Only `@triton.jit` functions live here; the host side is in `backends/`."""
