"""Public checkpoints: configurations, names of tensors, folders in and out, adapters, quantised formats."""
