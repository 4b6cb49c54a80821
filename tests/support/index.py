"""A package index in a folder: wheels of a few files, for pip to find without a network."""

import hashlib
import zipfile

from kvpolicy.evaluate.fetch.wheel import Wheel


def build_wheel(folder, project, version, files):
    """Writes a wheel with these files, bytes by name; returns how kvpolicy pins it."""
    stem = f"{project.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    return Wheel(project, version, hashlib.sha256(data).hexdigest(), len(data), "a licence")


def settings(folder):
    """Environment variables that let pip look there and nowhere else."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": "/dev/null"}
