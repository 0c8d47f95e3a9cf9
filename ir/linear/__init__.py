"""Linears whose weight is packed: one semantic op and a spec, formats that say how numbers are written."""
