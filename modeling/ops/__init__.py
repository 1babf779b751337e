"""Attention as operators on projected vectors: what is allowed, what is right, and several ways to compute it."""
