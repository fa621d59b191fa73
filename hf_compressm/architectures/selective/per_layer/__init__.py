"""Transformers' Auto classes learn here of a Mamba whose layers have state sizes of their own."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .modeling_compressm_mamba import CompreSSMMambaConfig, CompreSSMMambaForCausalLM, CompreSSMMambaModel

__all__ = ["CompreSSMMambaConfig", "CompreSSMMambaForCausalLM", "CompreSSMMambaModel"]

AutoConfig.register(CompreSSMMambaConfig.model_type, CompreSSMMambaConfig, exist_ok=True)
AutoModel.register(CompreSSMMambaConfig, CompreSSMMambaModel, exist_ok=True)
AutoModelForCausalLM.register(CompreSSMMambaConfig, CompreSSMMambaForCausalLM, exist_ok=True)
