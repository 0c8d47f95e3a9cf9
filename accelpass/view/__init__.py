"""Reports, pages and pictures."""
