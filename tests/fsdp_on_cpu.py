"""Runs a script with accelerate's FSDP on CPU processes: `python tests/fsdp_on_cpu.py SCRIPT OPTIONS`.

Without this accelerate takes no notice of FSDP on CPUs and runs DDP. It compares the kind of processes with those that
FSDP is for; here one of these is the CPU's.
"""

import runpy
import sys
import types
from pathlib import Path

import accelerate.state


kinds = types.SimpleNamespace(**{kind.name: kind for kind in accelerate.state.DistributedType})
kinds.MULTI_SDAA = kinds.MULTI_CPU
accelerate.state.DistributedType = kinds

if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # as for a script that is run itself
    runpy.run_path(sys.argv[0], run_name="__main__")
