"""This room holds the selective scan as an operator of torch, in C++, Triton and PyTorch, without Transformers."""

from .scan import effective_time_step, sampled_scan, selective_scan

__all__ = ["effective_time_step", "sampled_scan", "selective_scan"]
