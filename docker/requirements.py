"""Prints what reelmae needs, with the extras that are named, one requirement a line: python requirements.py ray curate

So that an image installs it before the code is there, and changed code installs nothing of it again. Reads pyproject.toml
in the working folder.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
unknown = [name for name in sys.argv[1:] if name not in extras]
if unknown:
    sys.exit(f"requirements.py: no such extra: {', '.join(unknown)}; pyproject.toml has {', '.join(extras)}")
print(*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
