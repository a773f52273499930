"""`python -m fpn`."""

import sys

from fpn.command.main import main

if __name__ == "__main__":
    sys.exit(main())
