"""Files that are named as a tar and are none: each is told by what it is, with what to do."""

import io
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest

from pipeline.corpus.tar import DamagedTarError, list_members


def write(save, *arguments):
    out = io.BytesIO()
    save(*arguments, out)
    return out.getvalue()


def write_zip(names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, b"x" * 1000)
    return out.getvalue()


def describe(data):
    with pytest.raises(DamagedTarError) as error:
        list_members(io.BytesIO(data), num_bytes=len(data))
    assert error.value.offset == 0
    return f"{error.value.got}. {error.value.advice}"


TABLE = pa.table({"x": [1, 2, 3]})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 10485760\n"
S3 = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>A'
DVC = "outs:\n- md5: a304afb96060aad90176268345e10355\n  size: 10240\n  path: x.tar\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (LFS.format("0" * 64), "a Git LFS pointer. Run `git lfs pull`"),
        (LFS.format("0" * 64).replace("\n", "\r\n"), "a Git LFS pointer. Run `git lfs pull`"),
        ("/annex/objects/SHA256E-s10240--0123.tar\n", "a git-annex pointer. Run `git annex get`"),
        ("../.git/annex/objects/x/y/SHA1-s1--0/SHA1-s1--0", "a git-annex pointer. Run `git ann"),
        (DVC, "a DVC pointer. Run `dvc pull`"),
        ("<!DOCTYPE html>\n<html lang=en>" * 99, "an HTML page: '<!DOCTYPE html> <html lang=en>"),
        ("\ufeff\r\n <HTML><head><title>502", "an HTML page: '<HTML><head><title>502'. A download"),
        (S3, "XML or HTML: '<?xml … AccessDenied</Code> … fetch it again"),
        ("<!-- a --><p>Sorry, no", "XML or HTML: '<!-- a --><p>Sorry, no'. A download that fails"),
        ('{"error": "Repository not found"}', """a text: '{"error": "Repository not found"}'"""),
        ('[\n  {"message": 1}]', """a text: '[ {"message": 1}]'. A download that fails"""),
        ("404: Not Found", "a text: '404: Not Found'. A download that fails leaves such a file"),
        ("Entry not found\n" * 400, "a text: 'Entry not found Entry … …'. A download"),
        ("kein Zugriff für größe".encode("latin-1"), "a text: 'kein Zugriff f\ufffdr"),
    ],
)
def test_texts_in_place_of_a_tar(data, expected):
    found = describe(data if isinstance(data, bytes) else data.encode())
    assert all(part in found for part in expected.split(" … ")), found


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (write_zip(["a.jpg"]), "a zip archive. Unpack it"),
        (write_zip([]), "an empty zip archive. Unpack it"),
        (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(99), "a 7z archive. Unpack it"),
        (b"Rar!\x1a\7\1\0" + bytes(600), "a rar archive. Unpack it"),
        (write(pyarrow.parquet.write_table, TABLE), "a Parquet file. Write its images"),
        (b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(4000), "macOS' attributes of another file"),
    ],
)  # fmt: skip
def test_archives_and_other_data(data, expected):
    assert describe(data).startswith(expected)


def test_what_is_not_known_is_told_as_damage():
    for data in (bytes(range(1, 256)) * 4, b"\xff" * 1000, bytes(511) + b"!" * 1000):
        with pytest.raises(DamagedTarError, match="byte 0: expected a header with the checksum"):
            list_members(io.BytesIO(data), num_bytes=len(data))
