"""Lets the tests of training import the small run that their worker processes import too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
