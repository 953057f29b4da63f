"""What can be wrong with a bundle or with an image.

    TwogateError
    ├── BundleError            a bundle is missing, damaged, or not what its manifest says
    └── ImageError             an image is refused before or while it is decoded
        ├── UnsupportedMedia   not JPEG, PNG or WebP by its content        (HTTP 415)
        ├── ImageTooLarge      its header promises more than the limits     (HTTP 413)
        └── UndecodableImage   damaged, truncated or too small              (HTTP 422)

Every message may be shown to a client: it names no path of this machine and quotes no library.
"""

from __future__ import annotations


class TwogateError(Exception):
    """Base of every error whose message is meant for a person."""


class BundleError(TwogateError):
    """A bundle cannot be used. `file` is the guilty file's name inside the bundle, `reason` what is wrong with it.

    `bundle` says which one, name/version, where that is known.
    """

    def __init__(self, file: str, reason: str, bundle: str = "") -> None:
        super().__init__(f"{bundle}: {file}: {reason}" if bundle else f"{file}: {reason}")
        self.file = file
        self.reason = reason


class ImageError(TwogateError):
    """An image that is refused."""


class UnsupportedMedia(ImageError):
    """The bytes are not of an accepted type. `detected` is the type seen in the first bytes, if it has a name."""

    def __init__(self, detected: str | None, accepted: tuple[str, ...]) -> None:
        seen = f"this looks like {detected}" if detected else "the content is none of them"
        super().__init__(f"accepted are {', '.join(accepted)}; {seen}")
        self.detected = detected
        self.accepted = accepted


class ImageTooLarge(ImageError):
    """The header promises more pixels, or a longer side, than allowed. Nothing was decoded."""

    def __init__(self, what: str, limit: int, actual: int) -> None:
        super().__init__(f"{what} is {actual}, the limit is {limit}")
        self.what = what
        self.limit = limit
        self.actual = actual


class UndecodableImage(ImageError):
    """The bytes claim to be an accepted type, but no picture comes out of them."""
