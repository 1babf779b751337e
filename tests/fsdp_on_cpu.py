"""scripts/train.py under FSDP on a CPU. accelerate shards on accelerators only, so it is told that there are some."""

import sys
from pathlib import Path

from accelerate import DistributedType, PartialState


sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import train


PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
train.main([*sys.argv[1:], "--accelerator_config", '{"use_configured_state": true}'])
train.end_process()
