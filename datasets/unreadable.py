"""Says in a few words why a file is not a readable image: empty, a video, cut off after 50 %."""

import re

from utils.files import open_regular

_STARTS = {
    b"%PDF": "a PDF", b"%!PS": "PostScript, which is not run", b"PK\x03\x04": "an archive", b"\x1f\x8b": "an archive",
    b"\x1aE\xdf\xa3": "a video", b"\x00\x00\x01\xba": "a video", b"\x00\x00\x01\xb3": "a video",
    b"\x00\x05\x16\x07": "a file of attributes that macOS wrote", b"8BPS": "a damaged Photoshop file",
}  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
HEIF_ADVICE = "pip install pillow-heif"


def kind_of_file(path):
    """What the file at `path` is by its first bytes, where that is no image; None otherwise."""
    try:
        with open_regular(path) as file:
            return _kind_of_content(file.read(4096))
    except OSError as error:
        return error.strerror or "cannot be read"


def is_cut_off(error):
    """Whether an exception of Pillow says that the file ends too early."""
    return bool(re.search(r"truncated|unexpected end|early end|not enough", str(error), re.IGNORECASE))


def kind_of_damage(error):
    """What an exception of Pillow says about a file that is no other kind of file."""
    if "cannot identify" in str(error):
        return "of no known format"
    return f"damaged, {type(error).__name__}"


def _kind_of_content(start):
    if not start:
        return "an empty file"
    if not start.strip(b"\0"):
        return "zeros only"
    for signature, kind in _STARTS.items():
        if start.startswith(signature):
            return kind
    if start[4:8] == b"ftyp":
        if start[8:12] in _HEIF_BRANDS:
            return f"HEIC; {HEIF_ADVICE}" if not _reads_heif() else None
        return "a video" if start[8:12] not in (b"avif", b"avis", b"jp2 ", b"jpx ") else None
    if start.startswith(b"RIFF") and start[8:12] == b"AVI ":
        return "a video"
    if re.match(rb"(\xef\xbb\xbf)?\s*<", start):
        return "SVG, which only browsers show" if b"<svg" in start else "a text"
    return "a text" if _is_text(start) else None


def _reads_heif():
    try:
        import pillow_heif  # noqa: F401
    except ImportError:
        return False
    return True


def _is_text(start):
    """Whether the first bytes of a file are printable text."""
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # not a character that is cut in two
            return False
        text = start[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter.isspace() for letter in text)
