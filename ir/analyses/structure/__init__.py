"""What a graph consists of: blocks, MLPs, norms, experts, linears, caches, the output head, and what each costs."""
