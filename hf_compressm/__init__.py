"""Pretrain Mamba language models that start with a large state and shrink it while they learn."""

import sys
from importlib.metadata import version

from .architectures.installed_scan import install_scan, uninstall_scan
from .architectures.time_invariant.lru import LRUConfig, LRUForSequenceClassification, LRUModel
from .config import CompreSSMConfig
from .console.environment import env_report
from .reduction import analyze, compress
from .sharing.hub import push_compressed
from .sharing.model_card import CardDetails
from .surgery.basis import prepare
from .surgery.optimizer_state import parameter_groups
from .theory import hankel
from .training.callback import CompreSSMCallback
from .training.schedule import CompreSSMSchedule

__version__ = version("hf_compressm")
sys.modules[f"{__name__}.hankel"] = hankel  # it is public under this name, wherever its file lies

__all__ = [
    "CardDetails",
    "CompreSSMCallback",
    "CompreSSMConfig",
    "CompreSSMSchedule",
    "LRUConfig",
    "LRUForSequenceClassification",
    "LRUModel",
    "analyze",
    "compress",
    "env_report",
    "hankel",
    "install_scan",
    "parameter_groups",
    "prepare",
    "push_compressed",
    "uninstall_scan",
]
