"""What METHODS says, done the plain way with hooks on an unmodified transformers model."""
