"""Rows of text -> tokens -> micro-batches."""
