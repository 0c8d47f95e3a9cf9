"""Videos: what a frame shows again is neither computed nor read again."""
