"""``python -m medsec.data``."""

import sys

from medsec.data.sources import main

if __name__ == "__main__":
    sys.exit(main())
