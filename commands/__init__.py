"""The commands of `hf-reformer`, a module each; `entry_point.py` finds them."""
