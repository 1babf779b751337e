"""The Reformer's layers, operators and models; one idea of the paper per file."""
