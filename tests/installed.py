"""A distribution in a folder of its own, installed into a fresh virtual environment, as its users install it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

__all__ = ["Installed"]

ROOT = Path(__file__).resolve().parent.parent


class Installed:
    """Install it, and run what is in it or what uses it.

    Args:
        folder: the distribution; commands run in it.
        environment: where the virtual environment is made.
    """

    def __init__(self, folder: Path, environment: Path) -> None:
        self.folder = folder
        venv.create(environment, with_pip=False, symlinks=True)
        self.python = environment / "bin" / "python"
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONWARNINGS": "error",
        }
        # What is installed here (evalkit's dependencies, pytest, hatchling) is there too, without a download.
        (packages,) = (environment / "lib").glob("python*/site-packages")
        here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (packages / "here.pth").write_text(
            "".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(here))
        )
        self._install()

    def run(self, *args: str, cwd: Path | None = None) -> str:
        """Run a command line, and return what it prints; one that fails is a failure of the test."""
        return self._run(args, cwd or self.folder, self.environment)

    def suite(self, *args: str) -> str:
        """Run its tests, and return the closing line of pytest."""
        options = ["-q", "-W", "error", "-p", "no:cacheprovider", *args]
        return self.run(str(self.python), "-m", "pytest", *options, "tests").splitlines()[-1]

    def _install(self) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(self.python)]
        quietly = {name: value for name, value in self.environment.items() if name != "PYTHONWARNINGS"}
        install = [*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "."]
        self._run(install, self.folder, quietly)  # pip's own warnings are not ours

    def _run(self, args: list[str] | tuple[str, ...], cwd: Path, environment: dict[str, str]) -> str:
        done = subprocess.run(args, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
