"""Speed and memory of the step, measured beside other libraries: ``python -m benchmarks performance``."""
