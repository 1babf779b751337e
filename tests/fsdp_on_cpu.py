"""`hf-reformer train` under FSDP on a CPU. accelerate shards on accelerators only, so it is told of some."""

import sys

from accelerate import DistributedType, PartialState

from hf_reformer.commands import train, training_process


PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
train.main([*sys.argv[1:], "--accelerator_config", '{"use_configured_state": true}'])
training_process.end_process()
