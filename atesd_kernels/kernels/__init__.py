"""Triton kernels: `@triton.jit` functions only. `backends/` launches them."""
