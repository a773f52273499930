"""`python -m fpn`."""

import sys

from fpn.demo.command import main

if __name__ == "__main__":
    sys.exit(main())
