"""Configuration of the Reformer."""
