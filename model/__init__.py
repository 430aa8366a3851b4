"""Computes a step: checkpoints, tokenizers, backends, sampling."""
