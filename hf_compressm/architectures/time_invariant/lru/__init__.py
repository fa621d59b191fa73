"""The Linear Recurrent Unit is here a Transformers model: it is time-invariant, so the method is exact on it."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .configuration_lru import LRUConfig
from .modeling_lru import LRUForSequenceClassification, LRUModel, LRUPreTrainedModel

__all__ = ["LRUConfig", "LRUForSequenceClassification", "LRUModel", "LRUPreTrainedModel"]

AutoConfig.register(LRUConfig.model_type, LRUConfig, exist_ok=True)
AutoModel.register(LRUConfig, LRUModel, exist_ok=True)
AutoModelForSequenceClassification.register(LRUConfig, LRUForSequenceClassification, exist_ok=True)
