"""Checks of the package in other people's tools, one module for each tool; `check_integrations.py` runs them."""
