"""Output of the commands for people: progress display, sampled answers, the summary of a run, figures, the HTML report.

Estimators and tables of evaluations belong to `rspo_jax.evaluation`, the metrics file to `rspo_jax.run`. Import the
modules directly: figures need matplotlib, which the progress display does without.
"""
