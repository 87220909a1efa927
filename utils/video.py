"""Writing videos with PyAV, which is an optional extra."""

import os
from contextlib import ExitStack
from fractions import Fraction

from PIL import Image

from utils.files import atomic_write


class VideoWriter:
    """An MP4 file of pictures, all of the size of the first; a context that ends the file.

    The file is there when the context has ended, whole; it is not where an exception ends it, or
    where no picture came.

    Args:
        path: of the file to write.
        rate: pictures a second.
    """

    def __init__(self, path: str | os.PathLike, rate: Fraction) -> None:
        import av

        self.av, self.path = av, path
        # MPEG-4 counts time in at most 65,535 parts of a second.
        self.rate = Fraction(rate).limit_denominator(65_535)
        self.open = ExitStack()
        self.size: tuple[int, int] | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, _kind: type | None, error: BaseException | None, _trace: object) -> None:
        with self.open:
            if error is not None:
                raise error
            if self.size is not None:
                self.container.mux(self.stream.encode())

    def add(self, picture: Image.Image) -> None:
        """Add a picture.

        Raises:
            OSError: the file cannot be written.
        """
        if self.size is None:
            self._begin(picture)
        frame = self.av.VideoFrame.from_image(picture.crop((0, 0, *self.size)))
        self.container.mux(self.stream.encode(frame))

    def _begin(self, picture: Image.Image) -> None:
        unfinished = self.open.enter_context(atomic_write(self.path))
        self.container = self.open.enter_context(self.av.open(str(unfinished), "w"))
        codec = "libx264" if "libx264" in self.av.codecs_available else "mpeg4"
        self.stream = self.container.add_stream(codec, self.rate)
        self.stream.pix_fmt = "yuv420p"
        # Both lengths are even: colours are stored for two pixels each way.
        self.size = picture.width // 2 * 2, picture.height // 2 * 2
        self.stream.width, self.stream.height = self.size
