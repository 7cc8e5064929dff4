"""``python -m bmctl``, and what ``torchrun -m bmctl`` starts on every rank."""

import sys

from bmctl.cli import main

if __name__ == "__main__":
    sys.exit(main())
