"""Row kernels that take a row's listed entries out of its logits, and put their gradient back.

Between the two, the sweeps of `logprobs` see -inf at the listed entries. torch's gather and scatter would need a place
for padding ids, and several launches.
"""

import triton
import triton.language as tl


@triton.jit
def take_listed(S, IDS, MASK, LISTED, stride_s, K, V, BLOCK: tl.constexpr):
    """Stores the logits at a row's ids in LISTED, and -inf in their place in S. Padding, and ids outside [0, V), give
    -inf in LISTED."""
    row = tl.program_id(0).to(tl.int64)
    counted = True
    if MASK is not None:
        counted = tl.load(MASK + row) != 0
    for k in range(0, K, BLOCK):
        place = k + tl.arange(0, BLOCK)
        ids = tl.load(IDS + row * K + place, mask=place < K, other=-1)
        here = (ids >= 0) & (ids < V) & counted
        z = tl.load(S + row * stride_s + ids, mask=here, other=-float("inf"))
        tl.store(LISTED + row * K + place, z, mask=place < K)
        tl.store(S + row * stride_s + ids, tl.full([BLOCK], -float("inf"), S.dtype.element_ty), mask=here)


@triton.jit
def put_listed(G, IDS, MASK, GRAD_LISTED, stride_g, K, V, BLOCK: tl.constexpr):
    """Stores the gradient GRAD_LISTED of a row's listed logits at their ids in G."""
    row = tl.program_id(0).to(tl.int64)
    counted = True
    if MASK is not None:
        counted = tl.load(MASK + row) != 0
    for k in range(0, K, BLOCK):
        place = k + tl.arange(0, BLOCK)
        ids = tl.load(IDS + row * K + place, mask=place < K, other=-1)
        here = (ids >= 0) & (ids < V) & counted
        g = tl.load(GRAD_LISTED + row * K + place, mask=here, other=0.0)
        tl.store(G + row * stride_g + ids, g.to(G.dtype.element_ty), mask=here)
