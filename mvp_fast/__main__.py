"""`python -m mvp_fast` and `torchrun -m mvp_fast` are the command `mvp-fast`."""

import sys

from mvp_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
