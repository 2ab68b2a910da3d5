"""`python3 -m devicecheck`, as `device/check` calls it."""

import sys

from .command import main

sys.exit(main())
