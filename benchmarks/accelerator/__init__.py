"""What a person with a GPU or a TPU runs: ``python -m benchmarks accelerator``."""
