"""The module that the engine trains: the student, its projectors, hooks, head loss and stepping stones."""
