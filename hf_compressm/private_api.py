"""One table lists every name of other packages that this one uses and that they do not promise to keep.

Such a name may change in any release. So each is listed with what it serves and with the releases in which the tests
saw it. `check_private_names` compares the table with what is installed, where the names matter, before any work is
done. The names of a Mamba layer's own tensors (`A_log`, `x_proj`, …) are not listed: every checkpoint carries them.
"""

import functools
import importlib
import inspect
import logging
import re
from importlib.metadata import version
from typing import NamedTuple

logger = logging.getLogger(__name__)

# The releases that the tests passed with. setup.cfg admits no later Transformers; of torch it does, since only several
# processes need private names of it, and `engines` checks those.
TESTED = {
    "torch": ("2.13",),
    "transformers": ("5.23", "5.24"),
    "accelerate": ("1.15",),
}


class PrivateName(NamedTuple):
    """A private name is one that another package may change without notice."""

    owner: str  # the module or class that it belongs to, by its path
    name: str
    purpose: str  # what this package needs it for

    @property
    def package(self) -> str:
        """Return the package that it belongs to, by its name on PyPI."""
        return self.owner.split(".")[0]

    @property
    def seen_in(self) -> tuple[str, ...]:
        """Return the releases of that package in which the tests saw it."""
        return TESTED[self.package]

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


def _names(owner: str, purpose: str, names: str) -> list[PrivateName]:
    return [PrivateName(owner, name, purpose) for name in names.split()]


MAMBA = "transformers.models.mamba.modeling_mamba"
MAMBA2_MIXERS = {  # the module, and its mixer of Mamba-2's kind
    "bamba": "BambaMixer",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "mamba2": "Mamba2Mixer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "zamba2": "Zamba2MambaMixer",
}
TRAINER = "transformers.Trainer"
FSDP = "torch.distributed.fsdp._fully_shard"
DATA_PARALLEL = "torch.nn.parallel.DistributedDataParallel"

PRIVATE_NAMES = (
    # Transformers: the model
    *_names(
        MAMBA,
        "install_scan puts the scans of this package in the place of these functions.",
        "mamba_selective_scan mamba_inner_fn mamba_selective_state_update causal_conv1d_fn causal_conv1d_update",
    ),
    *(
        name
        for module in ("falcon_mamba.modeling_falcon_mamba", "jamba.modeling_jamba", "zamba.modeling_zamba")
        for name in _names(
            f"transformers.models.{module}",
            "install_scan puts the scans of this package in the place of these functions.",
            "mamba_selective_scan mamba_selective_state_update causal_conv1d_fn causal_conv1d_update",
        )
    ),
    *_names(
        "transformers.models.falcon_mamba.modeling_falcon_mamba",
        "install_scan puts the scans of this package in the place of this function.",
        "mamba_inner_fn",
    ),
    *_names(
        "transformers.integrations.hub_kernels",
        "Whose kernel a function of a model calls is seen in what this leaves of it.",
        "use_kernel_func_from_hub_with_fallback",
    ),
    *_names(
        MAMBA,
        "A model with a state size per layer is built of these classes; resizing looks for the block.",
        "MambaBlock MambaPreTrainedModel MambaRMSNorm",
    ),
    *_names(f"{MAMBA}.MambaModel", "It renames parameters of old checkpoints, here too.", "load_hook"),
    *(
        row
        for name, mixer in MAMBA2_MIXERS.items()
        for row in _names(
            f"transformers.models.{name}.modeling_{name}",
            "A balanced mixer is derived from this one, and calls these functions.",
            f"{mixer} apply_mask_to_padding_states causal_conv1d_fn causal_conv1d_update mamba2_chunk_scan "
            "mamba2_selective_state_update",
        )
    ),
    *(
        row
        for name in MAMBA2_MIXERS
        for row in _names(
            f"transformers.models.{name}.modeling_{name}",
            "install_scan puts the scans of this package in the place of these functions.",
            "causal_conv1d_fn causal_conv1d_update mamba2_chunk_scan mamba2_selective_state_update "
            "mamba2_split_conv1d_scan_combined",
        )
    ),
    *_names(
        "transformers.models.falcon_h1.modeling_falcon_h1",
        "A balanced Falcon-H1 that was loaded gets its multipliers from it.",
        "compute_mup_vector",
    ),
    *_names(
        "transformers.Cache",
        "A balanced mixer keeps its states there.",
        "get_conv_state get_recurrent_state is_recording_past update_conv_state update_recurrent_state",
    ),
    *_names(
        "transformers.integrations.accelerate",
        "A balanced mixer uses the weight of its convolution without that one's forward.",
        "force_accelerate_hooks",
    ),
    *_names(
        "transformers.conversion_mapping",
        "Files of balanced models name their weights as those of the models that they come from.",
        "get_checkpoint_conversion_mapping register_checkpoint_conversion_mapping",
    ),
    *_names(
        "transformers.PreTrainedModel",
        "The models of this package set or override these.",
        "_can_set_experts_implementation _init_weights _no_split_modules supports_gradient_checkpointing",
    ),
    *_names(
        "transformers.PreTrainedModel",
        "A push of save_pretrained uploads the file of the model's class, which has to lie there by then.",
        "_upload_modified_files",
    ),
    *_names("transformers.modeling_layers", "The LRU's blocks are such layers.", "GradientCheckpointingLayer"),
    *_names("transformers.utils", "The LRU's models return a tuple where it is asked for.", "can_return_tuple"),
    *_names("transformers.initialization", "The LRU initialises with it.", "copy_ lecun_normal_ normal_ zeros_"),
    *_names("transformers.PreTrainedConfig", "A config that asks for kernels is refused.", "_attn_implementation"),
    # Transformers: Trainer
    *_names(
        TRAINER,
        "The model first takes the size of a checkpoint, and weights that have other names in it are converted.",
        "_load_best_model _load_from_checkpoint _load_optimizer_and_scheduler",
    ),
    *_names(
        TRAINER, "FSDP2 would miss the state of parameters that were not used yet.", "_load_optimizer_and_scheduler"
    ),
    *_names(
        TRAINER,
        "What belongs to the weights is pushed with them, and a push that failed is reported.",
        "_push_from_checkpoint _finish_current_push push_in_progress",
    ),
    *_names(
        TRAINER,
        "The callback finds its trainer's model, optimizer and callbacks.",
        "callback_handler call_model_init create_optimizer create_model_card is_fsdp_enabled model_wrapped",
    ),
    *_names("transformers.trainer_callback", "The callback's state travels in Trainer's.", "ExportableState"),
    *_names("transformers.trainer", "Checkpoints are recognised by their files.", "TRAINER_STATE_NAME"),
    *_names("transformers.trainer_utils", "Checkpoints are recognised by their folders.", "PREFIX_CHECKPOINT_DIR"),
    *_names("transformers.trainer_utils", "Options of Trainer are of these kinds.", "HubStrategy IntervalStrategy"),
    *_names(
        "transformers.utils",
        "Files of a checkpoint are found by these names.",
        "ADAPTER_CONFIG_NAME CONFIG_NAME GENERATION_CONFIG_NAME "
        "SAFE_WEIGHTS_INDEX_NAME SAFE_WEIGHTS_NAME WEIGHTS_NAME",
    ),
    # Accelerate
    *_names(
        "accelerate.utils.constants",
        "Files of a checkpoint are found by these names.",
        "FSDP_MODEL_NAME OPTIMIZER_NAME",
    ),
    *_names("accelerate.optimizer", "The optimizer of torch is taken out of it.", "AcceleratedOptimizer"),
    # torch: modules and tensors
    *_names(
        "torch.nn.Module",
        "A parameter is replaced, and a wrapper rebuilt, with what hangs on it.",
        "_parameters _forward_hooks _forward_pre_hooks _backward_hooks _register_load_state_dict_pre_hook",
    ),
    *_names(
        "torch.Tensor",
        "Hooks on the gradient of a parameter that is to be replaced are refused.",
        "_backward_hooks _post_accumulate_grad_hooks",
    ),
    *_names("torch._dynamo.eval_frame.OptimizedModule", "The model behind torch.compile is found.", "_orig_mod"),
    *_names("torch.autograd.forward_ad", "A scan is told that torch differentiates forwards.", "_current_level"),
    *_names("torch", "A scan is told of a transform of torch.func.", "_C"),
    *_names("torch._C", "A scan is told of a transform of torch.func.", "_are_functorch_transforms_active"),
    *_names("torch", "Whether anything was compiled is seen from the module that is loaded then.", "_dynamo"),
    # torch: DistributedDataParallel
    *_names(
        DATA_PARALLEL,
        "The wrapper is built again around new parameters, with its options and hooks.",
        "reducer logger device_ids output_device dim forward_sync_buffers process_group bucket_bytes_cap "
        "bucket_bytes_cap_default find_unused_parameters gradient_as_bucket_view static_graph mixed_precision "
        "_comm_hooks",
    ),
    *_names(
        DATA_PARALLEL,
        "Parameters that a balanced model does not use yet are left out of the gradients that it waits for.",
        "_ddp_params_and_buffers_to_ignore",
    ),
    *_names(DATA_PARALLEL, "An option that cannot follow a resize is refused.", "_delay_all_reduce_params"),
    *_names("torch.distributed.Reducer", "An old reducer lets go of its parameters.", "_remove_autograd_hooks"),
    # torch: FSDP2
    *_names("torch.distributed.fsdp.FSDPModule", "The groups of parameters are found.", "_get_fsdp_state"),
    *_names(f"{FSDP}._fsdp_state.FSDPState", "The groups of parameters are found.", "_fsdp_param_groups"),
    *_names(
        f"{FSDP}._fsdp_param_group.FSDPParamGroup",
        "A new parameter is held as the old one was.",
        "fsdp_params post_forward_mesh_info device mp_policy offload_policy",
    ),
    *_names(f"{FSDP}._fsdp_param", "A parameter is replaced in place.", "FSDPParam"),
    *_names(
        f"{FSDP}._fsdp_param.FSDPParam",
        "A parameter is replaced in place, or refused.",
        "sharded_param mesh_info fsdp_placement offload_to_cpu init_dtype_attrs _module_info _param_fqn "
        "_post_load_hook_handle",
    ),
)


def missing_private_names(*owners: str) -> list[PrivateName]:
    """Return the names of the table that the installed packages do not have.

    Args:
        owners: only names whose path starts with one of these; by default all.
    """
    return [row for row in PRIVATE_NAMES if str(row).startswith(owners or "") and not _exists(row)]


@functools.cache
def check_private_names(*owners: str) -> None:
    """Refuse an installed package that lacks a name, and warn once of a release that was not tested.

    Args:
        owners: starts of paths in one package, such as "transformers.Trainer": the names that are about to be used.

    Raises:
        ValueError: the installed package lacks names.
    """
    package = owners[0].split(".")[0]
    missing = missing_private_names(*owners)
    if missing:
        raise ValueError(
            f"{installed(package)} has no {', '.join(map(str, missing))}, which hf_compressm needs. {remedy(package)}"
        )
    if not is_tested(package):
        logger.warning(
            f"hf_compressm uses private names of {' and '.join(owners)}, and was not tested with "
            f"{installed(package)}. {remedy(package)}"
        )


def is_tested(package: str) -> bool:
    """Return whether the installed release of a package is one that the tests passed with."""
    return ".".join(version(package).split(".")[:2]) in TESTED[package]


def installed(package: str) -> str:
    """Return the package with its release, as errors name it."""
    return f"{package} {version(package)}"


def remedy(package: str) -> str:
    """Return the sentences that say which releases were tested and how to install one."""
    tested = TESTED[package]
    return (
        f"The tests passed with {', '.join(tested)}. Install such a release: pip install '{package}=={tested[-1]}.*'."
    )


def _exists(row: PrivateName) -> bool:
    """Return whether the owner has the name: as an attribute, or in the source of a class whose methods use it."""
    try:
        owner = _resolve(row.owner)
    except (ImportError, AttributeError):
        return False
    if hasattr(owner, row.name):
        return True
    assigned = re.compile(rf"\b(self|module)\.{row.name}\b")
    bases = [base for base in getattr(owner, "__mro__", ()) if base.__module__ != "builtins"]
    return any(row.name in vars(base).get("__annotations__", {}) or assigned.search(_source(base)) for base in bases)


def _resolve(path: str):
    """Return the module, or the attribute of a module, of that path."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        if not parent:
            raise
        return getattr(_resolve(parent), name)


@functools.cache
def _source(owner: type) -> str:
    try:
        return inspect.getsource(owner)
    except (OSError, TypeError):  # a class that is not of Python
        return ""
