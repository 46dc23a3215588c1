"""The Dockerfiles: linted, non-root, and what they copy is there and builds the package.

The images themselves are not built here, which would need a container daemon.
"""

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from .conftest import ROOT, run_python

DOCKERFILES = [ROOT / "launch/Dockerfile", ROOT / "launch/Dockerfile.tpu"]
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)
each_dockerfile = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)


def instructions(path):
    """(instruction, rest of the line), comments out and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
@each_dockerfile
def test_linter_has_nothing_to_say(path):
    result = subprocess.run(
        [HADOLINT, "--no-color", path], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_linter_would_say_something(tmp_path):
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN pip install torch\n")
    result = subprocess.run([HADOLINT, "--no-color", bad], capture_output=True, check=False)
    assert result.returncode != 0


@each_dockerfile
def test_it_does_not_run_as_root(path):
    users = [rest for word, rest in instructions(path) if word == "USER"]
    assert users
    assert users[-1] not in ("root", "0")


@each_dockerfile
def test_what_is_copied_is_there_and_not_ignored(path):
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored  # nothing but what is named
    for word, rest in instructions(path):
        for source in rest.split()[:-1] if word == "COPY" else ():
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignored, source


@each_dockerfile
def test_what_is_copied_builds_the_package(path, tmp_path):
    """With the files of the COPY lines alone, setuptools makes the package and knows the extras."""
    wanted = set()
    for word, rest in instructions(path):
        if word == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, tmp_path / target)
                else:
                    shutil.copy(ROOT / source, tmp_path / target)
        for extras in re.findall(r"\./\[([\w,]+)\]", rest):
            wanted |= set(extras.split(","))
    made = "from setuptools import setup; setup()"
    run_python("-c", made, "-q", "egg_info", "build", "--build-lib", "made", cwd=tmp_path)
    built = {file.name for file in (tmp_path / "made/bioscan_xla").iterdir()}
    assert {file.name for file in (ROOT / "bioscan_xla").glob("*.py")} | {"py.typed"} <= built
    known = ConfigParser()
    known.read(tmp_path / "setup.cfg")
    assert wanted
    assert wanted <= set(known["options.extras_require"])


def test_commands_in_their_headers_name_real_things():
    for path in DOCKERFILES:
        header = path.read_text().split("FROM")[0]
        for named in re.findall(r"(?:/app/|-f )(\S+/\S+)", header):
            assert (ROOT / named).is_file(), named
        assert f"-f launch/{path.name} " in header
