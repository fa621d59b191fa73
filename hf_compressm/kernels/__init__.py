"""The selective scan where mamba-ssm does not serve, and the door through which statistics are observed."""

from .installation import (
    install_scan,
    observed_scan,
    reference_loop_would_run,
    scan_in_force,
    scan_installed,
    scan_is_installed,
    uninstall_scan,
)
from .scan import effective_time_step, sampled_scan, selective_scan

__all__ = [
    "effective_time_step",
    "install_scan",
    "observed_scan",
    "reference_loop_would_run",
    "sampled_scan",
    "scan_in_force",
    "scan_installed",
    "scan_is_installed",
    "selective_scan",
    "uninstall_scan",
]
