"""`hf-reformer generate` from a checkout; commands/generate.py does the work."""

from hf_reformer.commands.generate import main


if __name__ == "__main__":
    main()
