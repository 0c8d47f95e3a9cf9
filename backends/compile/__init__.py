"""From Dynamo's graph to compiled code."""
