"""A model cut into stages: each is compiled once for each variant, and a policy on the host chooses which ones run."""
