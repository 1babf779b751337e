"""Experiments of docs/experiments.md: a module for each, and what they share."""
