"""What the commands do, one file each or one for two that are a pair."""
