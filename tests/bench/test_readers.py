"""npz files as people have them: read where they can be, and otherwise one line that names argument, file and key."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest

from bench.instrument import readers
from bench.instrument.readers import Npz

IMAGES = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)


def npy(array: np.ndarray, **header) -> bytes:
    """What np.save writes, with some of the header changed."""
    plain = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, plain | header)
    return file.getvalue() + array.tobytes()


def archive(path, compression=zipfile.ZIP_STORED, **members: bytes):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def flipped(path, offset_from: bytes, offset: int = 40):
    """Turn over one byte some way behind the first place of a mark."""
    data = bytearray(path.read_bytes())
    data[data.index(offset_from) + offset] ^= 0x10
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["arr_0.npy", "arr_0"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_with_and_without_npy_at_the_end(tmp_path, name, compression):
    file = Npz(archive(tmp_path / "a.npz", compression, **{name: npy(IMAGES)}), "A.npz")
    assert file.keys == {"arr_0"} and file.header("arr_0").shape == IMAGES.shape
    assert np.array_equal(file.read("arr_0"), IMAGES)
    for size in (1, 4, 6, 9):
        assert np.array_equal(np.concatenate(list(file.batches("arr_0", size))), IMAGES)


def test_what_numpy_writes_is_read(tmp_path):
    arrays = {"f": np.asfortranarray(IMAGES), "scalar": np.int64(3), "text": np.array("x"), "none": np.zeros((0, 2)),
              "big": np.arange(3, dtype=">f4"), "long": np.arange(3, dtype=np.longdouble)}  # fmt: skip
    np.savez(tmp_path / "a.npz", **arrays)
    for key, value in arrays.items():
        got = Npz(tmp_path / "a.npz").read(key)
        assert np.array_equal(got, value) and got.dtype == value.dtype


def test_an_array_that_was_read_may_be_written(tmp_path):
    np.savez(tmp_path / "a.npz", a=IMAGES)
    Npz(tmp_path / "a.npz").read("a")[0] = 1


NUMBERS = npy(np.zeros((3, 2)))
FAULTS = {
    "a wrong checksum": (lambda path: flipped(archive(path, a=npy(IMAGES)), b"NUMPY", 150), "CRC"),
    "a broken stream": (
        lambda path: flipped(archive(path, zipfile.ZIP_DEFLATED, a=npy(IMAGES)), b"a", 60), "expected a readable array"
    ),
    "10**12 images": (lambda path: archive(path, a=npy(IMAGES, shape=(10**12, 4, 4, 3))), "48000000000000 bytes"),
    "a negative number of images": (lambda path: archive(path, a=npy(IMAGES, shape=(-6, 4, 4, 3))), "-6"),
    "fewer images than there are": (lambda path: archive(path, a=npy(IMAGES, shape=(5, 4, 4, 3))), "before 288"),
    "data that end early": (lambda path: archive(path, a=npy(IMAGES)[:-1]), "288 bytes, before 287"),
    "objects": (lambda path: archive(path, a=npy(np.zeros(2, np.int64), descr="|O")), "Object arrays"),
    "no array": (lambda path: archive(path, a=b"some text"), "magic string"),
    "an empty member": (lambda path: archive(path, a=b""), "readable array"),
    "another npy format": (lambda path: archive(path, a=NUMBERS[:6] + b"\x03" + NUMBERS[7:]), r"npy format \(3, 0\)"),
    "a header that is no dict": (lambda path: archive(path, a=NUMBERS.replace(b"{", b"[")), "header"),
    "a header without end": (
        lambda path: archive(path, a=NUMBERS[:8] + struct.pack("<H", 60_000) + NUMBERS[10:]), "EOF|header"
    ),
    "a header too large": (
        lambda path: archive(path, a=NUMBERS[:8] + struct.pack("<H", 30_000) + b"{" + b" " * 30_000), "header"
    ),
    "an encrypted member": (lambda path: encrypted(archive(path, a=npy(IMAGES))), "encrypted"),
}  # fmt: skip


def encrypted(path):
    """Set the flag in the local header and in the directory."""
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x03\x04") + 6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_members_are_one_line_with_argument_file_and_key(tmp_path, fault):
    make, message = FAULTS[fault]
    path = make(tmp_path / "bad.npz")
    for use in (lambda file: file.read("a"), lambda file: list(file.batches("a", 4))):
        with pytest.raises(ValueError, match=message) as error:
            use(Npz(path, "--ref"))
        assert str(error.value).startswith(f"--ref {path}: a: expected") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "came"),
    [
        ("none.npz", None, "there is no such file"),
        ("text.npz", b"no archive", "no npz"),
        ("empty.npz", b"", "no npz"),
        ("one.npy", npy(IMAGES), "a single array"),
        ("one.npz", npy(IMAGES), "a single array"),
        ("photo.JPG", b"\xff\xd8\xff", "lossy"),
        ("cut.npz", b"PK\x05\x06" + bytes(18), ""),
    ],
)
def test_what_is_no_npz_is_named(tmp_path, name, content, came):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    if not came:
        assert Npz(path).keys == set()
        return
    with pytest.raises(ValueError, match=came) as error:
        Npz(path, "A.npz", "samples")
    assert str(error.value).startswith(f"A.npz {path}: expected samples, got ")
    with pytest.raises(ValueError, match="got a folder"):
        Npz(tmp_path)


@pytest.mark.parametrize(
    ("shape", "axes", "taken"),
    [
        ((9, 8, 8, 3), "NHWC", ""),
        ((9, 8, 8, 1), "NHWC", "(9, 8, 8, 1) taken as grey (N, height, width, channels)"),
        ((9, 3, 8, 6), "NCHW", "(9, 3, 8, 6) taken as (N, channels, height, width)"),
        ((9, 1, 8, 6), "NCHW", "(9, 1, 8, 6) taken as grey (N, channels, height, width)"),
        ((9, 8, 6), "NHW", "(9, 8, 6) taken as grey (N, height, width)"),
    ],
)
def test_images_are_taken_for_what_their_shape_says(shape, axes, taken):
    assert readers.image_axes(shape) == axes and readers.axes_taken(shape, axes) == taken
    images = np.arange(np.prod(shape)).reshape(shape)
    got = readers.channels_last(images, axes)
    first = got[0, ..., 0]
    assert got.ndim == 4 and np.array_equal(
        first, images[0, 0] if axes == "NCHW" else images[0].reshape(got[0].shape)[..., 0]
    )


@pytest.mark.parametrize(
    "shape", [(9, 3, 8, 3), (9, 1, 8, 1), (9, 3, 8, 1), (9, 8, 8, 4), (256, 256, 3), (8, 8), (1,) * 5]
)
def test_shapes_that_may_be_either_are_no_images(shape):
    assert readers.image_axes(shape) == ""
