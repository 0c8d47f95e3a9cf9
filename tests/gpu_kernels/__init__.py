"""Every Triton kernel and autotune config compiled to machine code for GPUs that this machine does not have."""
