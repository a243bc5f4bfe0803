"""``python -m at_extensions.cli`` is the command line."""

import sys

from at_extensions.cli import main

sys.exit(main())
