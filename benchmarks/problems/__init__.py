"""What is solved: data, model and loss."""
