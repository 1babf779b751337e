"""`hf-reformer evaluate` from a checkout; commands/evaluate.py does the work."""

from hf_reformer.commands.evaluate import main


if __name__ == "__main__":
    main()
