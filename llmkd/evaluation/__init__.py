"""Five scoring steps over a list of model folders, each in a process of its own."""
