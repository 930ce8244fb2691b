"""`python -m moe_dist`, and with it `torchrun -m moe_dist` and `deepspeed --module moe_dist`."""

import sys

from moe_dist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
