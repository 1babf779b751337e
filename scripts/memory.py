"""`hf-reformer memory` from a checkout; commands/memory.py does the work."""

from hf_reformer.commands.memory import main


if __name__ == "__main__":
    main()
