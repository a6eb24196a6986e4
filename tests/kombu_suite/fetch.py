"""Unpack t/integration/common.py of the installed kombu's sdist into a directory: `python fetch.py DIRECTORY`."""

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

WANTED = {"t/__init__.py", "t/integration/__init__.py", "t/integration/common.py"}


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "--dest", str(directory), f"kombu=={version('kombu')}"], check=True)
    with tarfile.open(next(directory.glob("kombu-*.tar.gz"))) as sdist:
        for member in sdist.getmembers():
            name = str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))
            if member.isfile() and name in WANTED:
                target = directory / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(sdist.extractfile(member).read())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
