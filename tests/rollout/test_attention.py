"""Attention while the Hugging Face engine decodes."""

import torch

from atesd.rollout.hf import attention_of_any_length


def test_cudnn_attention_is_off_while_decoding_and_as_before_afterwards():
    for enabled in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        try:
            with attention_of_any_length():
                assert not torch.backends.cuda.cudnn_sdp_enabled()
                assert torch.backends.cuda.mem_efficient_sdp_enabled()
            assert torch.backends.cuda.cudnn_sdp_enabled() == enabled
        finally:
            torch.backends.cuda.enable_cudnn_sdp(True)
