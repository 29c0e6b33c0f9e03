"""What runs the images and services stands beside these tests, as modules of their own."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
