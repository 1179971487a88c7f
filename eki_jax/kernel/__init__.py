"""The ensemble algebra: products with covariances, the walk in place, devices, and the evaluation of the model."""
