"""Flax mixture-of-experts transformers as `rspo_jax.types.Policy`; they import nothing else of ours."""
