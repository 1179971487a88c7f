"""The tables and figures of the paper and its slides, one module an experiment."""
