"""Some draws as one file: arrays and what they were made with, checked when read.

The file is an uncompressed .npz (`numpy.load` reads it) and after it the SHA-256 of
all that. No byte of it can change or be missing unnoticed, and nothing in it is run:
pickled objects are refused, sizes are checked before memory is taken.
"""

import hashlib
import io
import json
import zipfile
from typing import Any

import numpy as np

from .files import canonical


MARK = b"gradflow sha256\n"
TRAILER = len(MARK) + hashlib.sha256().digest_size
MADE = "made.json"
# Booleans, integers, floating and complex numbers, text: all but objects.
KINDS = "biufcSU"


class Damaged(ValueError):
    """A file that is not what was written."""


def pack(arrays: dict[str, np.ndarray], made: dict[str, Any]) -> bytes:
    """The file's bytes: the same for the same arrays.

    **Raises:** `ValueError` for an array of objects.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        # A `ZipInfo` has a fixed date, so that equal chunks are equal files.
        archive.writestr(_member(MADE), canonical(made))
        for name, array in arrays.items():
            if array.dtype.kind not in KINDS:
                raise ValueError(
                    f"{name} has dtype {array.dtype}, which can't be stored: give "
                    "numbers, truth values or text"
                )
            # As `numpy.save`, but for its copies: to get memory takes longer than to
            # fill it.
            array = np.asarray(array, order="C")
            header = np.lib.format.header_data_from_array_1_0(array)
            member = _member(name + ".npy")
            member.file_size = array.nbytes
            with archive.open(member, "w") as npy:
                np.lib.format.write_array_header_1_0(npy, header)
                npy.write(array.reshape(-1).view(np.uint8).data)
    buffer.write(MARK + hashlib.sha256(buffer.getbuffer()).digest())
    return buffer.getvalue()


def unpack(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and what they were made with.

    **Raises:** `Damaged` for anything that `pack` did not write.
    """
    data, trailer = content[:-TRAILER], content[-TRAILER:]
    if trailer != MARK + hashlib.sha256(data).digest():
        raise Damaged("its checksum does not match")
    # A checksum says nothing of who wrote the file: do not trust its contents.
    try:
        return _read(data)
    except Damaged:
        raise
    except Exception as error:
        # zipfile and numpy have many errors for what is none of their files.
        raise Damaged(f"it can't be read ({type(error).__name__})") from None


def _read(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, made = {}, None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data):
                raise Damaged(f"{info.filename} is larger than the file")
            content = archive.read(info)
            if info.filename == MADE:
                made = json.loads(content)
            else:
                name = info.filename.removesuffix(".npy")
                arrays[name] = _array(name, content)
    if not isinstance(made, dict):
        raise Damaged("it does not say what it was made with")
    return arrays, made


def _array(name: str, content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise Damaged(f"{name} is in another format")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.kind not in KINDS:
        raise Damaged(f"{name} holds pickled objects; refused")
    rest = content[stream.tell() :]
    # In Python's integers, which don't overflow.
    size = dtype.itemsize
    for length in shape:
        size *= length
    if fortran or size != len(rest):
        raise Damaged(f"{name} is not as large as it says")
    if size == 0:
        return np.zeros(shape, dtype)
    return np.frombuffer(rest, dtype).reshape(shape).copy()


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.create_system = 3  # whatever the system
    return member
