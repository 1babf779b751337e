"""Triton kernels and their launches; imported when they are needed."""
