"""Tasks whose problems are generated here, with the checkers of their answers.

Belongs here: problems, generators, checkers and their data sets on disk, one package per task (`countdown`, `knights`);
`tfds_folders`, which stores generated data sets; `answers`, which extracts a final answer from a text. Does not belong
here: rewards (`rspo_jax.rewards.puzzles`), examples and the table of data sets (`rspo_jax.data`), and models.
"""
