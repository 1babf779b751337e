"""Figures of docs/ that measure something else than speed."""
