"""`hf-reformer train` under DeepSpeed on a CPU."""

from hf_reformer.commands.train import run_process


def compile_nothing():
    """
    Tell DeepSpeed that its sums in shared memory do not work here, so that it does not compile them for a minute.

    Only models whose matrices are split over processes use them, for inference.
    """
    # Here and not above, because it changes functions of torch for the whole process.
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    compile_nothing()
    run_process()
