"""Attention in training and decoding: packed rows, one short sequence on a CPU, one new token on a CPU."""
