"""The selective scan is an operator of torch, in C++, Triton and PyTorch. Nothing here knows Transformers."""

from .scan import effective_time_step, sampled_scan, selective_scan

__all__ = ["effective_time_step", "sampled_scan", "selective_scan"]
