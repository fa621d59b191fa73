"""The selective scan where mamba-ssm does not serve, and the door through which statistics are observed."""

from .dispatch import (
    install_scan,
    observed_scan,
    reference_loop_would_run,
    scan_installed,
    scan_is_installed,
    scan_name,
    uninstall_scan,
)
from .torch_scan import selective_scan

__all__ = [
    "install_scan",
    "observed_scan",
    "reference_loop_would_run",
    "scan_installed",
    "scan_is_installed",
    "scan_name",
    "selective_scan",
    "uninstall_scan",
]
