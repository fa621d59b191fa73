"""In this Mamba each layer has a state size of its own: layer i has `config.per_layer_config[i].state_size`.

This file needs nothing but transformers. It is saved beside the weights of every such model, so that
`from_pretrained(..., trust_remote_code=True)` works where hf_compressm is not installed.

The configuration follows the schema that Transformers has for such models. Once its own `MambaModel` builds each
layer from `config.per_layer_config[i]`, this file can go: in `config.json` `model_type` becomes "mamba" and
`architectures` ["MambaForCausalLM"], and `auto_map` falls away; the weights stay as they are. In hf_compressm the
folder `per_layer` and the changes of class in `architectures/selective/mamba.py` go with it.
"""

import os
import shutil

from torch import nn
from transformers import GenerationMixin, MambaConfig, MambaForCausalLM, MambaModel
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaPreTrainedModel, MambaRMSNorm

MODULE = "modeling_compressm_mamba"  # this file's name beside the weights
AUTO_MAP = {
    "AutoConfig": f"{MODULE}.CompreSSMMambaConfig",
    "AutoModel": f"{MODULE}.CompreSSMMambaModel",
    "AutoModelForCausalLM": f"{MODULE}.CompreSSMMambaForCausalLM",
}


class CompreSSMMambaConfig(MambaConfig):
    """The configuration adds `per_layer_config={i: {"state_size": N_i}, …}`; other layers have `state_size` states."""

    model_type = "compressm_mamba"


class _SavedWithItsCode:
    """This class puts this file beside the weights wherever a model is saved, and into every push."""

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """Save the model as Transformers does, and this file beside it."""
        self.config.auto_map = dict(AUTO_MAP)  # one that was loaded from the Hub names its repository there
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            _copy_this_file(save_directory)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        _copy_this_file(working_dir)  # save_pretrained(push_to_hub=True) uploads before it returns
        return super()._upload_modified_files(working_dir, *args, **kwargs)


class CompreSSMMambaModel(_SavedWithItsCode, MambaModel):
    """The model is a `MambaModel` whose layers are each built from a configuration of their own."""

    config: CompreSSMMambaConfig
    config_class = CompreSSMMambaConfig

    def __init__(self, config: CompreSSMMambaConfig):
        MambaPreTrainedModel.__init__(self, config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MambaBlock(layer, layer_idx=i) for i, layer in enumerate(config.per_layer_config))
        self.gradient_checkpointing = False
        self.norm_f = MambaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self._register_load_state_dict_pre_hook(self.load_hook)
        self.post_init()


class CompreSSMMambaForCausalLM(_SavedWithItsCode, MambaForCausalLM, GenerationMixin):
    """The language model is a `MambaForCausalLM` over a `CompreSSMMambaModel`.

    It names GenerationMixin itself: Transformers would derive another class from it, which could not be pickled.
    """

    config: CompreSSMMambaConfig
    config_class = CompreSSMMambaConfig

    def __init__(self, config: CompreSSMMambaConfig):
        MambaPreTrainedModel.__init__(self, config)
        self.backbone = CompreSSMMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def _copy_this_file(folder):
    copy = os.path.join(folder, f"{MODULE}.py")
    if not os.path.exists(copy) or not os.path.samefile(copy, __file__):
        shutil.copyfile(__file__, copy)


__all__ = ["CompreSSMMambaConfig", "CompreSSMMambaForCausalLM", "CompreSSMMambaModel"]
