"""Train and evaluate a model: ``python run_recbole_mmdiff.py --model=DiffCDR --key=value``."""

import sys

from recbole_mmdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
