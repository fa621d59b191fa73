"""The scans are operators of torch: in PyTorch, C++ and, that of Mamba-1, Triton. Nothing here knows Transformers."""

from .scan import effective_time_step, sampled_scan, selective_scan

__all__ = ["effective_time_step", "sampled_scan", "selective_scan"]
