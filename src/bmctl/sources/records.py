"""One line of a stream: where its label stands, and how it becomes an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from bmctl.errors import DataError
from bmctl.sources.classes import Label

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Layout:
    """What a line is made of."""

    is_json: bool
    shape: tuple[int, ...] | None
    label: Literal["first", "last"]

    def label_of(self, line: bytes, *, where: str) -> Label:
        """A class by number, or by name; the whole line is looked at as far as that is cheap."""
        import json
        import math

        if self.is_json:
            try:
                value: Any = json.loads(line)["label"]
            except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
                raise DataError(f"{where}: expected an object with image and label", hint="one on each line") from error
            if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
                raise DataError(f"{where}: label {str(value)[:40]!r}, expected a number or a name", hint="see the line")
            return value
        assert self.shape is not None
        expected = math.prod(self.shape) + 1
        if line.count(b",") + 1 != expected:
            raise DataError(
                f"{where}: {line.count(b',') + 1} fields, expected a label and {expected - 1} pixels",
                hint="--set data.source.shape=[HEIGHT,WIDTH], and 3 for colour",
            )
        first, last = line.split(b",", 1)[0], line.rsplit(b",", 1)[1]
        text = (first if self.label == "first" else last).decode("utf-8", "replace").strip()
        if not text:
            raise DataError(f"{where}: the label is missing", hint="--set data.source.label=first, or last")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text

    def decode(self, line: bytes, *, where: str) -> Image.Image:
        """The image of a line.

        Raises:
            DataError: Pixels that are none, or an image that cannot be decoded.
        """
        import base64
        import json
        from io import BytesIO

        if self.is_json:
            from bmctl.core.images import read

            try:
                body = base64.b64decode(json.loads(line)["image"], validate=True)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f"{where}: the image is not base64 text", hint="see the key image") from error
            return read(BytesIO(body), name=where)
        import numpy as np
        from PIL import Image

        assert self.shape is not None
        fields = line.split(b",")
        try:
            pixels = bytes(map(int, fields[1:] if self.label == "first" else fields[:-1]))
        except ValueError as error:
            raise DataError(
                f"{where}: pixels must be whole numbers from 0 to 255", hint="or is the label at the other end?"
            ) from error
        return Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(self.shape))

    def is_heading(self, line: bytes) -> bool:
        return not self.is_json and not any(byte in b"0123456789" for byte in line.split(b",", 1)[0])
