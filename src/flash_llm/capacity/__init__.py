"""What fits on which GPUs, and how fast it can be: a roofline, from a model's config alone."""
