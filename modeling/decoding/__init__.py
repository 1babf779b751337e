"""What a causal model keeps of a text, and what it does with the next tokens."""
