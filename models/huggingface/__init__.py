"""Hugging Face's formats: `config.json`, checkpoint folders, PEFT adapters, published quantised formats, and the shapes
of public models. A public family is added in `families.py` and `tensor_map.py`. Layers and the functions that run a
model belong in `models.layers` and `models.policy`; tokenizers belong in `rspo_jax.tokenization`.
"""

from models.huggingface.adapter import load_adapter, read_adapter_config, save_adapter
from models.huggingface.checkpoint import load_pretrained, read_config, save_pretrained
from models.huggingface.config_json import config_from_hf, config_to_hf
from models.huggingface.known_configs import PUBLISHED, known_config

__all__ = [
  "PUBLISHED",
  "config_from_hf",
  "config_to_hf",
  "known_config",
  "load_adapter",
  "load_pretrained",
  "read_adapter_config",
  "read_config",
  "save_adapter",
  "save_pretrained",
]
