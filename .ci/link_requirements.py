#!/usr/bin/env python3
"""Link what an installed sjd2 declares as its requirements, and nothing else, from this interpreter's environment.

    PYTHON .ci/link_requirements.py SITE-PACKAGES

The folder then holds what pip would download for the wheel without extras, at the versions that PYTHON has: a package that is
imported but only declared by an extra, or by nothing, is missing there as it is for a user.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, distribution, distributions
from importlib.util import cache_from_source
from pathlib import Path

from packaging.requirements import Requirement


def requirements(dist: Distribution, extras: set[str]) -> list[Requirement]:
    """Return the requirements of a distribution that hold here, with those of its chosen extras."""
    found = [Requirement(line) for line in dist.requires or []]
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras | {""})]


def closure(dist: Distribution) -> dict[str, Distribution]:
    """Return everything that `dist` needs, itself left out. Raises PackageNotFoundError for what is not installed here."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    open_ = requirements(dist, set())
    while open_:
        requirement = open_.pop()
        key = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            found[key[0]] = distribution(requirement.name)
            open_ += requirements(found[key[0]], set(requirement.extras))
    return found


def link(dist: Distribution, site: Path) -> None:
    """Link the files of a distribution into `site`, with what is compiled of them; packages that share a folder are merged."""
    for file in dist.files or []:
        source, target = Path(str(dist.locate_file(file))), site / file
        if file.parts[0] in ("..", "__pycache__") or target.exists():
            continue  # scripts, and what another distribution has brought already
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
        if source.suffix == ".py" and (compiled := Path(cache_from_source(str(source)))).is_file():
            cached = Path(cache_from_source(str(target)))  # Python looks here, and compiles for seconds what it lacks
            cached.parent.mkdir(exist_ok=True)
            if not cached.exists():
                cached.symlink_to(compiled)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (installed,) = distributions(name="sjd2", path=[str(folder)])
    for needed in closure(installed).values():
        link(needed, folder)
