"""Runs over several nodes: namespaces of this machine that are joined by a virtual cable."""
