"""Checks of the package in other people's tools, one module for each tool; scripts/check_integrations.py runs them."""
