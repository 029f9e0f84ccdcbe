"""Commands: train, evaluate, compare, convert, report. The only package that knows absl flags and ml_collections."""
