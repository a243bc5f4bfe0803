"""Lets the tests of observers import the rigged training that their worker processes import too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
