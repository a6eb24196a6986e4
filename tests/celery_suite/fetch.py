"""Unpack t/integration of the installed Celery's sdist into a directory: `python fetch.py DIRECTORY`."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    release = version("celery")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "--dest", str(directory), f"celery=={release}"], check=True)
    with tarfile.open(directory / f"celery-{release}.tar.gz") as sdist:
        for member in sdist.getmembers():
            name = PurePosixPath(*PurePosixPath(member.name).parts[1:])
            if member.isfile() and is_wanted(name):
                target = directory / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(sdist.extractfile(member).read())


def is_wanted(name: PurePosixPath) -> bool:
    return name.suffix == ".py" and (name.parent == PurePosixPath("t") or name.is_relative_to("t/integration"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
