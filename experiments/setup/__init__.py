"""From a config to the components of a run: data, model, optimizers, samplers, benchmarks, devices."""
