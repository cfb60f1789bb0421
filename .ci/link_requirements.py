"""Link what a wheel asks for, and nothing else, out of this interpreter's environment: link_requirements.py WHEEL FOLDER.

As an installer does, it follows the requirements of requirements and fails if one is missing or too old; but it downloads
nothing. A package that only the environment has, e.g. for tests, stays out of reach.
"""

import sys
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path
from zipfile import Path as ZipPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def link(found: Distribution, folder: Path) -> None:
    """Link the top-level files and folders of a distribution."""
    for name in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__", "bin"}:
        target = folder / name
        if not target.exists():
            target.symlink_to(Path(str(found.locate_file(name))))


def main(wheel: Path, folder: Path) -> None:
    """Link the requirements of `wheel` into `folder`."""
    (info,) = (part for part in ZipPath(wheel).iterdir() if part.name.endswith(".dist-info"))
    waiting, linked = [(PathDistribution(info), "")], set()
    while waiting:
        user, extra = waiting.pop()
        for requirement in map(Requirement, user.requires or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            found = distribution(requirement.name)
            if not requirement.specifier.contains(found.version, prereleases=True):
                sys.exit(f"{user.name} wants {requirement}, the environment has {found.version}")
            for more in ("", *sorted(requirement.extras)):
                if (canonicalize_name(requirement.name), more) not in linked:
                    linked.add((canonicalize_name(requirement.name), more))
                    waiting.append((found, more))
            link(found, folder)
    print(f"linked {len({name for name, _ in linked})} distributions")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
