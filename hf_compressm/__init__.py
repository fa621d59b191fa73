"""Pretrain Mamba language models that start with a large state and shrink it while they learn."""

from importlib.metadata import version

from .callback import CompreSSMCallback
from .config import CompreSSMConfig, CompreSSMSchedule
from .kernels import install_scan, uninstall_scan
from .lru import LRUConfig, LRUForSequenceClassification, LRUModel
from .optimizers import parameter_groups
from .reduction import analyze, compress

__version__ = version("hf_compressm")

__all__ = [
    "CompreSSMCallback",
    "CompreSSMConfig",
    "CompreSSMSchedule",
    "LRUConfig",
    "LRUForSequenceClassification",
    "LRUModel",
    "analyze",
    "compress",
    "install_scan",
    "parameter_groups",
    "uninstall_scan",
]
