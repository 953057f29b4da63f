"""Last step of the image's build stage: put Twogate into the environment, leave out what serving never reads, list the rest.

    python3 finish.py /opt/twogate /build

Standard library only. The same sources and pins give the same files.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import uuid
from importlib.metadata import Distribution, distributions
from pathlib import Path

_NOT_SERVED = ("pip", "setuptools", "pkg_resources")
_NEVER_READ = ("tests", "testing/tests", "onnxruntime/tools", "onnxruntime/transformers", "onnxruntime/quantization")
_LAUNCHER = "#!/opt/twogate/bin/python\nfrom cli.main import app\n\napp(prog_name='twogate')\n"


def main(environment: Path, build: Path) -> None:
    """Finish `environment`, a virtual environment, from the files in `build`."""
    packages = next(environment.glob("lib/python3.*/site-packages"))
    for tool in _NOT_SERVED:
        for folder in packages.glob(f"{tool}*"):
            shutil.rmtree(folder)
    shutil.rmtree(packages / "_distutils_hack", ignore_errors=True)
    (packages / "distutils-precedence.pth").unlink(missing_ok=True)
    for pattern in _NEVER_READ:
        for folder in sorted(packages.rglob(pattern), reverse=True):
            shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(build / "app", packages, dirs_exist_ok=True)
    version = tomllib.loads((build / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    record = packages / f"twogate-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: twogate\nVersion: {version}\nLicense-Expression: Apache-2.0\n", encoding="utf-8"
    )
    for script in (environment / "bin").iterdir():
        if not script.name.startswith("python"):
            script.unlink()
    launcher = environment / "bin" / "twogate"
    launcher.write_text(_LAUNCHER, encoding="utf-8")
    launcher.chmod(0o755)
    (environment / "sbom.cdx.json").write_text(json.dumps(sbom(packages, version), indent=1) + "\n", encoding="utf-8")
    # Compiled here, since a container cannot write; by content, so that times do not matter.
    compiling = (sys.executable, "-m", "compileall", "-q", "-j0", "--invalidation-mode", "unchecked-hash", packages)
    subprocess.run([str(part) for part in compiling], check=True)
    subprocess.run(["chmod", "-R", "a+rX,go-w", str(environment)], check=True)


def sbom(packages: Path, version: str) -> dict[str, object]:
    """A CycloneDX bill of the Python packages in the image; those of the base image are the base's to list."""
    components = sorted((_component(found) for found in distributions(path=[str(packages)])), key=lambda part: part["purl"])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(components)).urn,
        "version": 1,
        "metadata": {"component": {"type": "application", "name": "twogate", "version": version, "bom-ref": "twogate"}},
        "components": components,
    }


def _component(found: Distribution) -> dict[str, str]:
    name, version = found.metadata["Name"], found.version
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
