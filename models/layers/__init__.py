"""The parts of the transformer: linen modules (`Transformer`, `Block`, `Attention`, `MoE`) and the functions on arrays
that they call (attention, experts, router, rotary positions). Configurations, and the functions that `rspo_jax` calls,
belong in `models`; linen is used in this package, in `models` and nowhere else.
"""
