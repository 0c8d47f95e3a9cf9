"""A model compiled once by AOTInductor: one file with its libraries, weights and a manifest. What opens it imports no compiler."""
