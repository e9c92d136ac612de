"""Build the site of the documentation with Zensical: `make docs` runs this.

The pages link to files of the repository, such as the example of a report, and can be read there, too. A site
holds only what is in its own folder. So the pages and the files that they link to are copied to `build/docs`
first, with the README as the home page, and links are made to fit. The site is `build/site`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALONE = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<=\]\()([^)#:]+)(?=[)#])")  # as far as a `#`; none with a scheme


def gather(folder: Path) -> None:
    """Copy all pages and the files that they link to into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pages = {ROOT / name: new for name, new in ALONE.items()}
    pages |= {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    for page, name in pages.items():
        text = page.read_text(encoding="utf-8")
        for link in set(_LINK.findall(text)):
            linked = (page.parent / link).resolve()
            if linked not in pages:
                _copy(linked.parent if linked.name == "index.html" else linked, folder)
        (folder / name).write_text(_LINK.sub(lambda link: _in_site(link[1]), text), encoding="utf-8")


def build(folder: Path) -> int:
    """Build the site in `site` of a folder; returns the exit code: not 0 where a link leads nowhere."""
    gather(folder / "docs")
    shutil.copyfile(ROOT / "docs" / "zensical.toml", folder / "zensical.toml")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    return subprocess.run(command, cwd=folder, check=False).returncode


def _copy(linked: Path, folder: Path) -> None:
    """Copy a file, or a folder whose page leads to its other files, to the same place in `folder`."""
    place = folder / linked.relative_to(ROOT)
    if linked.is_dir():
        shutil.copytree(linked, place, dirs_exist_ok=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(linked, place)


def _in_site(link: str) -> str:
    """Return where a link leads in the site, where all pages stand in one folder."""
    bare = link.removeprefix("../").removeprefix("docs/")
    return ALONE.get(bare, bare)


if __name__ == "__main__":
    sys.exit(build(ROOT / "build"))
