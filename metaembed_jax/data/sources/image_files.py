"""Images by the paths that a table names: in a folder, or in the ZIP archives in which such a folder is delivered.

No path leads out of the folder. Images are checked before they are copied: they are complete, and their size is bounded.
"""

import dataclasses
import io
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from metaembed_jax.errors import UserError, shortened
from metaembed_jax.inputs.image_formats import tiff_pages
from metaembed_jax.inputs.images import MAX_ASPECT_RATIO, image_errors, open_header, open_image

LARGEST_FILE = 128 * 2**20  # bytes of an encoded image


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """A folder of images. Can be pickled. Archives are opened when they are first needed, and stay open.

    Attributes:
      root: the folder that paths are relative to.
      archives: ZIP files, whose members have the paths that they would have in `root`; files in `root` come first.
    """

    root: Path
    archives: tuple[Path, ...] = ()
    _opened: dict[Path, zipfile.ZipFile] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": {}}

    def image(self, value: object, column: str) -> bytes:
        """Return the encoded image that a column holds, checked by `check_image`; empty if the value is absent.

        Raises:
          UserError: as `load`; or the image is broken.
        """
        encoded, name = self.load(value, column)
        return check_image(encoded, name) if encoded else b""

    def load(self, value: object, column: str) -> tuple[bytes, str]:
        """Return (encoded image, its name for errors) of the value of a column, unchecked; no bytes if the value is absent.

        Args:
          value: a path, encoded bytes, or both as `datasets` stores them, {"bytes", "path"}: its path is read if it has no bytes.

        Raises:
          UserError: the value is something else, or as `find`; or the file is very large. Names the column.
        """
        if is_absent(value):
            return b"", column
        content = image_content(value, column)
        encoded, name = (content, column) if isinstance(content, bytes) else self._read(content, column)
        if not encoded:
            raise UserError(f"{name}: the image has no bytes; expected an encoded image, or null")
        return encoded, name

    def _read(self, path: str, column: str) -> tuple[bytes, str]:
        try:
            archive, name = self.find(path)
            if archive:
                return _read_member(self._open(archive), archive, name), f"{column}: {archive}:{name}"
            return read_image_file(Path(name)), f"{column}: {name}"
        except UserError as error:
            raise UserError(f"{column}: {error}") from None

    def item(self, name: str, text: str | None, image: object, column: str) -> dict:
        """Return the item of a text and an image, without what is absent.

        Args:
          name: name of the item in its row, for errors.
          image: as for `load`.
          column: the column of the image, for errors.

        Raises:
          UserError: both are empty or one has another type, or the image is missing or broken.
        """
        if not isinstance(text, str | None):
            raise UserError(f"{name}: expected a string, not {type(text).__name__}")
        item: dict[str, str | bytes] = {"text": text} if text and text.strip() else {}
        if encoded := self.image(image, column):
            item["image"] = encoded
        if not item:
            raise UserError(f"{name} has neither text nor image")
        return item

    def find(self, path: str) -> tuple[Path | None, str]:
        """Return (archive, member) of an image, or (None, file).

        Raises:
          UserError: there is no such image, or it is outside of the folder.
        """
        if not isinstance(path, str):
            raise UserError(f"expected a string as the path of an image, not {type(path).__name__}")
        if "://" in path:
            raise UserError(f"{shortened(path)} is an address, which is not read; download the image, and write its path here")
        relative = PurePosixPath(path)
        if relative.is_absolute() or ".." in relative.parts:
            raise UserError(f"the image path {path!r} leads out of {self.root}; write it relative to that folder")
        # Macs store é as two characters, most other systems as one.
        spellings = [PurePosixPath(name) for name in dict.fromkeys([path, *(normalize(form, path) for form in ("NFC", "NFD"))])]
        for file in (self.root / spelling for spelling in spellings):
            if _is_file(file):
                if not file.resolve().is_relative_to(self.root.resolve()):
                    raise UserError(f"the image {file} is a link out of {self.root}; copy it there")
                return None, str(file)
        for archive in self.archives:
            for spelling in map(str, spellings):
                if spelling in self._open(archive).NameToInfo:
                    return archive, spelling
        raise UserError(f"the image {self.root / relative} is missing{self._hint(relative)}")

    def stamp(self, path: str) -> tuple[int, int]:
        """Return numbers that change with an image: the size and time of its file, or the size and checksum of a member.

        Raises:
          UserError: as `find`.
        """
        archive, name = self.find(path)
        if archive:
            member = self._open(archive).NameToInfo[name]
            return member.file_size, member.CRC
        status = Path(name).stat()
        return status.st_size, status.st_mtime_ns

    def stamps(self, values: Iterable[object]) -> list[tuple]:
        """Return (path, *stamp) of each file from which values of image columns, or lists of them, are read; (path,) if missing."""
        stamps = []
        for value in values:
            if isinstance(value, list):
                stamps += self.stamps(value)
            elif path := image_path(value):
                try:
                    stamps.append((path, *self.stamp(path)))
                except (UserError, OSError):  # named when the image is read
                    stamps.append((path,))
        return stamps

    def _open(self, archive: Path) -> zipfile.ZipFile:
        if archive not in self._opened:
            try:
                self._opened[archive] = zipfile.ZipFile(archive)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{archive} is not a readable ZIP archive ({error}); fetch it again") from error
        return self._opened[archive]

    def _hint(self, relative: PurePosixPath) -> str:
        """Return the end of an error that names the image one folder level up or down; empty if it is not there."""
        others = [PurePosixPath(*relative.parts[1:]), *(PurePosixPath(name) / relative for name in ("images", "eval_images"))]
        for other in others:
            if other.parts and _is_file(self.root / other):
                return f", but {self.root / other} exists: move the images by one folder level, so that the paths fit"
        return ""


def read_image_file(file: Path) -> bytes:
    """Return the encoded image in a file.

    Raises:
      UserError: the file is very large, or cannot be read.
    """
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise UserError(f"the image {file} has {file.stat().st_size} bytes; expected at most {LARGEST_FILE}")
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"the image {file} cannot be read ({error.strerror})") from error


def check_image(encoded: bytes, name: str) -> bytes:
    """Return the same bytes if they are a complete image of bounded size.

    JPEGs are decoded at an eighth of their size, which finds every truncation, as full size does; one that fails is decoded whole,
    which is what readers do. Changed bytes in the middle are found where they break the decoder: mostly in PNG, rarely in JPEG and
    WebP, which have no checksum, never in plain pixels.

    Raises:
      UserError: names the image and what is wrong.
    """
    with image_errors(name):
        image = open_header(io.BytesIO(encoded), name)
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            size = f"{image.width}x{image.height}"
            raise UserError(f"{name}: the image is {size}: one side is over {MAX_ASPECT_RATIO} times the other; crop or pad it")
        image.draft("RGB", (1, 1))
        try:
            image.load()
        except Exception:  # decoders of broken bytes raise errors of every kind
            open_image(encoded, name)
    return encoded


def unread_pages(item: dict) -> int:
    """Return the number of pages of an item's image that are not read: all but the first of a TIFF."""
    image = item.get("image")
    return len(tiff_pages(image)) - 1 if isinstance(image, bytes) else 0


def is_absent(value: object) -> bool:
    """Return True for the values of an image column that stand for no image: null, an empty string, a struct of nulls."""
    if isinstance(value, dict):
        return bool(value) and value.keys() <= {"bytes", "path"} and all(part is None or part == "" for part in value.values())
    return value is None or (isinstance(value, str) and not value)


def image_path(value: object) -> str | None:
    """Return the path from which `ImageFolder.load` reads the value of a column; None if it reads no file."""
    if isinstance(value, dict):
        value = value.get("path") if value.get("bytes") is None else None
    return value if isinstance(value, str) and value else None


def image_stamps(row: dict, folder: ImageFolder, columns: Sequence[str]) -> list[tuple]:
    """Return the stamps of the image files that a row names in some columns."""
    return folder.stamps(row.get(column) for column in columns)


def image_content(value: object, column: str) -> bytes | str:
    """Return the bytes that the value of an image column holds, or the path if it has none.

    Raises:
      UserError: the value is something else. Names the column.
    """
    content = value
    if isinstance(value, dict):
        fields = value if value.keys() <= {"bytes", "path"} else {}
        content = fields.get("path") if fields.get("bytes") is None else fields["bytes"]
        content = None if isinstance(content, str) and fields.get("bytes") is not None else content
    if not isinstance(content, bytes | str):
        raise UserError(f"{column} is {shortened(value)}; expected the path of an image, its bytes, {{'bytes', 'path'}}, or null")
    return content


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that no file can have
        return False


def _read_member(opened: zipfile.ZipFile, archive: Path, name: str) -> bytes:
    size = opened.getinfo(name).file_size
    if size > LARGEST_FILE:
        raise UserError(f"the image {archive}:{name} has {size} bytes; expected at most {LARGEST_FILE}")
    try:
        with opened.open(name) as file:
            return file.read(LARGEST_FILE)  # the size in an archive may be wrong
    except Exception as error:  # broken, encrypted or of an unknown method: each has its own error
        raise UserError(f"the image {archive}:{name} cannot be read ({error}); fetch the archive again") from error
