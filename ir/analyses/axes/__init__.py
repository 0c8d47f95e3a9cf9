"""What each dimension of each value is: batch, token, head, channel, expert, vocabulary."""
