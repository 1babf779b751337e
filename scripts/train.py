"""`hf-reformer train` from a checkout; commands/train.py does the work."""

from hf_reformer.commands.train import run_process


if __name__ == "__main__":
    run_process()
