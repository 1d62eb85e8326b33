"""Images by the paths that a table names: from a folder, or from the ZIP archives that such a folder is delivered in.

No path leaves the folder. Images are checked before they are copied anywhere: of bounded size, and whole.
"""

import dataclasses
import io
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from PIL import Image, UnidentifiedImageError

from metaembed_jax.errors import UserError
from metaembed_jax.inputs.images import MAX_ASPECT_RATIO, check_size

LARGEST_FILE = 128 * 2**20  # bytes of an encoded image


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of images. Survives pickling. Archives are opened when they are first needed, and stay open.

    Attributes:
      root: what paths are relative to.
      archives: ZIP files whose members stand where they would be extracted to under `root`; files beside them come first.
    """

    root: Path
    archives: tuple[Path, ...] = ()
    _opened: dict[Path, zipfile.ZipFile] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def read(self, path: str) -> bytes:
        """The encoded image at a path, checked by `check_image`.

        Raises:
          UserError: as `find`; or a broken image, or a very large file.
        """
        archive, where = self.find(path)
        if archive:
            return check_image(_member(self._open(archive), archive, where), f"{archive}:{where}")
        return check_image(read_image_file(Path(where)), where)

    def item(self, name: str, text: str | None, image: str | dict | None) -> dict:
        """A text and an image, where they are not empty; the image is a path, or inline.

        Args:
          name: of the item in its row, for errors.

        Raises:
          UserError: both are empty, one is something else, or the image is missing or broken.
        """
        if not isinstance(text, str | None):
            raise UserError(f"{name} is a {type(text).__name__}, not a text")
        found = {"text": text} if text and text.strip() else {}
        if isinstance(image, str):
            found |= {"image": self.read(image)} if image else {}
        elif inline(image):
            found["image"] = inline_image(name)(image)
        if not found:
            raise UserError(f"{name} has neither text nor image")
        return found

    def find(self, path: str) -> tuple[Path | None, str]:
        """Where an image is: (archive, member), or (None, file).

        Raises:
          UserError: no such image, or one outside of the folder.
        """
        if not isinstance(path, str):
            raise UserError(f"an image path is a {type(path).__name__}, not a text")
        relative = PurePosixPath(path)
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"the image path {path!r} leads out of {self.root}; write it relative to that folder")
        file = self.root / relative
        if _is_file(file):
            if not file.resolve().is_relative_to(self.root.resolve()):
                raise UserError(f"the image {file} is a link out of {self.root}; copy it there")
            return None, str(file)
        for archive in self.archives:
            if str(relative) in self._open(archive).NameToInfo:
                return archive, str(relative)
        raise UserError(f"the image {file} is missing{self._hint(relative)}")

    def stamp(self, path: str) -> tuple[int, int]:
        """What changes with an image: the size of its file, and when that was written; in an archive, its checksum.

        Raises:
          UserError: as `find`.
        """
        archive, where = self.find(path)
        if archive:
            member = self._open(archive).NameToInfo[where]
            return member.file_size, member.CRC
        about = Path(where).stat()
        return about.st_size, about.st_mtime_ns

    def _open(self, archive: Path) -> zipfile.ZipFile:
        if archive not in self._opened:
            try:
                self._opened[archive] = zipfile.ZipFile(archive)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{archive}: is no ZIP archive that can be read ({error}); fetch it again") from error
        return self._opened[archive]

    def _hint(self, relative: PurePosixPath) -> str:
        """Where it would be found, if the paths were one level more or less deep."""
        others = [PurePosixPath(*relative.parts[1:]), *(PurePosixPath(name) / relative for name in ("images", "eval_images"))]
        for other in others:
            if other.parts and _is_file(self.root / other):
                return f", but {self.root / other} is there: the images lie one level off; move them so that the paths fit"
        return ""


def read_image_file(file: Path) -> bytes:
    """The encoded image in a file.

    Raises:
      UserError: it is very large, or cannot be read.
    """
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"the image {file} has {file.stat().st_size} bytes; at most {LARGEST_FILE} are read")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"the image {file} cannot be read ({error.strerror})") from error


def check_image(encoded: bytes, name: str) -> bytes:
    """The same bytes, if they are a whole image of bounded size.

    JPEGs are read at an eighth of their size, which finds every cut, as reading all of it does. Bytes changed in the middle are
    found where they break the decoder: mostly in PNG, rarely in JPEG and WebP, which carry no checksum, never in plain pixels.

    Raises:
      UserError: names the image and what is wrong.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        check_size(image, name)
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            sides = f"{image.width}x{image.height}"
            raise UserError(f"the image {name} is {sides}: one side is over {MAX_ASPECT_RATIO} times the other; crop or pad it")
        image.draft("RGB", (1, 1))
        image.load()
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"the image {name} cannot be read (it is of no known kind); repair or remove it") from error
    except Exception as error:  # decoders of broken bytes raise errors of every kind
        raise UserError(f"the image {name} cannot be read ({' '.join(str(error).split())}); repair or remove it") from error
    return encoded


def inline(image) -> bytes:
    """The bytes of an image as `datasets` stores it: {"bytes", "path"}; empty for none."""
    if isinstance(image, dict):
        image = image.get("bytes")
    return image or b""


def inline_image(column: str) -> Callable[..., bytes]:
    """Checks and gives the bytes of an inline image of a column."""

    def read(image) -> bytes:
        return check_image(inline(image), f"in {column}")

    return read


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that no file can have
        return False


def _member(opened: zipfile.ZipFile, archive: Path, name: str) -> bytes:
    size = opened.getinfo(name).file_size
    if size > LARGEST_FILE:
        raise UserError(f"the image {archive}:{name} has {size} bytes; at most {LARGEST_FILE} are read")
    try:
        with opened.open(name) as file:
            return file.read(LARGEST_FILE)  # an archive may lie about the size
    except Exception as error:  # broken, encrypted or of an unknown method: each has an error of its own
        raise UserError(f"the image {archive}:{name} cannot be read ({error}); fetch the archive again") from error
