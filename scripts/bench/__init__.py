"""Speed and memory, measured: each program writes JSON into docs/ and draws from it."""
