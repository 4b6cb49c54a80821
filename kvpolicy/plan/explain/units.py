"""Numbers as people read them."""


def human_bytes(count: float) -> str:
    """`"1.5 MiB"`: a number of bytes in the largest unit that leaves something before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"
