"""An engine holds a model while it trains: one process, DistributedDataParallel or FSDP2, behind one interface.

All that distinguishes them is here, and nothing else.
"""

from .engine import Engine, run_with
from .parameters import check_replaceable, new_parameter_like, unused_frozen
from .processes import (
    all_processes,
    from_first_process,
    process_count,
    process_index,
    raise_in_all_processes,
    smallest_over_processes,
    sum_over_processes,
)
from .sharded import (
    can_run_unwrapped,
    change_class,
    full_tensor,
    gathered_parameters,
    is_sharded,
    original_class,
    shard_like,
    to_local,
)
from .training_arguments import check_engine, check_training_arguments, fsdp_is_asked
from .wrappers import unwrap, unwrap_optimizer

__all__ = [
    "Engine",
    "all_processes",
    "can_run_unwrapped",
    "change_class",
    "check_engine",
    "check_replaceable",
    "check_training_arguments",
    "from_first_process",
    "fsdp_is_asked",
    "full_tensor",
    "gathered_parameters",
    "is_sharded",
    "new_parameter_like",
    "original_class",
    "process_count",
    "process_index",
    "raise_in_all_processes",
    "run_with",
    "shard_like",
    "smallest_over_processes",
    "sum_over_processes",
    "to_local",
    "unused_frozen",
    "unwrap",
    "unwrap_optimizer",
]
