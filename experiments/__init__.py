"""F4: flags, configs, wiring and loops. The only place that knows absl and ml_collections."""
