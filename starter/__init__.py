"""
A small causal model of Python source that comes with the package, to try things with before one has trained anything.

>>> from hf_reformer.starter import FOLDER
>>> from transformers import pipeline
>>> generator = pipeline("text-generation", FOLDER)
"""

from pathlib import Path


FOLDER = str(Path(__file__).parent)
