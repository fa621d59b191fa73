"""This module finds what a report of a problem should say of the machine that it happened on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ..architectures.installed_scan import scan_in_force

PACKAGES = (
    "hf_compressm torch transformers accelerate datasets safetensors huggingface_hub numpy matplotlib mamba-ssm "
    "causal-conv1d kernels"
).split()


def env_report() -> dict[str, str]:
    """Return versions, devices, and which scans Mamba and Mamba-2 run on each kind of device, as texts by name."""
    report = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            report[package] = version(package)
        except PackageNotFoundError:
            report[package] = "not installed"
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report["CUDA devices"] = ", ".join(names) or "none"
    report["CPU threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    for device in devices:
        report[f"scan on {device}"] = scan_in_force(device)
        report[f"scan of Mamba-2 on {device}"] = scan_in_force(device, "mamba2")
    return report
