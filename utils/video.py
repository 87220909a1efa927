"""Writing videos with PyAV, which is an optional extra."""

import os
from fractions import Fraction

from PIL import Image


class VideoWriter:
    """An MP4 file of pictures, all of the size of the first; a context that ends the file.

    Args:
        path: of the file to write.
        rate: pictures a second.
    """

    def __init__(self, path: str | os.PathLike, rate: Fraction) -> None:
        import av

        self.av = av
        self.container = av.open(str(path), "w")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        # MPEG-4 counts time in at most 65,535 parts of a second.
        self.stream = self.container.add_stream(codec, Fraction(rate).limit_denominator(65_535))
        self.stream.pix_fmt = "yuv420p"
        self.size: tuple[int, int] | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        if self.size is not None:
            self.container.mux(self.stream.encode())
        self.container.close()

    def add(self, picture: Image.Image) -> None:
        if self.size is None:
            # Both lengths are even: colours are stored for two pixels each way.
            self.size = picture.width // 2 * 2, picture.height // 2 * 2
            self.stream.width, self.stream.height = self.size
        frame = self.av.VideoFrame.from_image(picture.crop((0, 0, *self.size)))
        self.container.mux(self.stream.encode(frame))
