"""What a model costs and how fast it is, and what the paper says about both."""
