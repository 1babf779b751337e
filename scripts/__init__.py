"""What a checkout runs: at the top what a user runs, below a room for each kind of work on the package."""
