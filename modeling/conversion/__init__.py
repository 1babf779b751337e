"""Models made from the weights of other implementations."""
