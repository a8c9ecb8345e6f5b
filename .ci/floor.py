"""Prints the oldest JAX, Flax and Optax that pyproject.toml allows, as requirements."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
print(*(requirement.replace(">=", "==") for requirement in project["dependencies"]), sep="\n")
