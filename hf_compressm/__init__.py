"""Pretrain Mamba language models that start with a large state and shrink it while they learn."""

from importlib.metadata import version

from .callback import CompreSSMCallback
from .config import CompreSSMConfig
from .environment import env_report
from .hub import push_compressed
from .kernels import install_scan, uninstall_scan
from .lru import LRUConfig, LRUForSequenceClassification, LRUModel
from .model_card import CardDetails
from .optimizers import parameter_groups
from .reduction import analyze, compress
from .schedule import CompreSSMSchedule

__version__ = version("hf_compressm")

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
    "install_scan",
    "parameter_groups",
    "push_compressed",
    "uninstall_scan",
]
