"""Prints pip constraints that pin every dependency to the oldest version that pyproject.toml allows."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
for requirement in (*project["dependencies"], *(one for extra in extras.values() for one in extra)):
    found = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+),<[0-9.]+", requirement)
    if not found:
        sys.exit(f"{requirement}: expected NAME>=LOWER,<UPPER")
    sys.stdout.write(f"{found[1]}=={found[2]}\n")
