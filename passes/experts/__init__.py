"""Passes of mixtures of experts: how tokens reach their experts, and experts that layers share."""
