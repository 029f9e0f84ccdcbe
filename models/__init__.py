"""Functional Flax mixture-of-experts transformers. They fill in `rspo_jax.types.Policy` and import nothing else of ours."""
