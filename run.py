"""sjd2 from a checkout: `python run.py` samples with the embedded model, `python run.py --help` shows what else there is."""

import sys

from harness.cli import main

if __name__ == "__main__":
    sys.exit(main())
