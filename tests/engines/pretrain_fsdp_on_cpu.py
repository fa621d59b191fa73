"""`scripts/pretrain.py` as it is, where Accelerate takes the processes for GPUs."""

import sys
from pathlib import Path

from fsdp_on_cpu import enable_fsdp_on_cpu

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import pretrain

parse_arguments = pretrain.parse_arguments


def parse_arguments_then_enable_fsdp(*given):
    parsed = parse_arguments(*given)
    enable_fsdp_on_cpu()
    return parsed


pretrain.parse_arguments = parse_arguments_then_enable_fsdp
pretrain.main()
