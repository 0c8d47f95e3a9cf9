"""Caches of keys and values: the ops that an ``accelpass.KVCache`` is to a graph, and the forms that passes give it."""
