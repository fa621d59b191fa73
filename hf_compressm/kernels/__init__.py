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
from .scan import selective_scan

__all__ = [
    "install_scan",
    "observed_scan",
    "reference_loop_would_run",
    "scan_in_force",
    "scan_installed",
    "scan_is_installed",
    "selective_scan",
    "uninstall_scan",
]
