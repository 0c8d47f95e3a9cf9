"""What is found out of a model by running it on data, for a plan."""
