"""The command lines of the project: training, the papers' experiments, speed and scaling.

``python -m benchmarks --help`` lists them.
"""
