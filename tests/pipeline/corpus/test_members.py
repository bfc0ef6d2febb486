"""Members to samples: one test or row for every reason to reject, and the accounting."""

import hashlib
import io
import json
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image

from pipeline.corpus.members import Limits, Reject, RejectReason, SampleMembers, group_members
from pipeline.corpus.tar import DamagedTarError, Member, list_members
from tests.support.decode_here import Sample, decode_sample

HEIGHT, WIDTH = 6, 8
RGB = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)


def encode(pixels, image_format="PNG"):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, image_format)
    return out.getvalue()


def make_mask(row):
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[row] = True
    return mask


IMAGE = encode(RGB)
MASKS = [encode(make_mask(row)) for row in range(3)]


def make_text(*phrases):
    return json.dumps({"phrases": phrases}).encode()


def whole(key="a", **changes):
    """The entries of one sample of two phrases; ``changes`` by extension, None to leave out."""
    parts = {
        "png": IMAGE,
        "json": make_text("red car", "sky"),
        "mask0.png": MASKS[0],
        "mask1.png": MASKS[1],
    }
    parts.update({extension.replace("_", "."): data for extension, data in changes.items()})
    return [(f"{key}.{ext}", data) for ext, data in parts.items() if data is not None]


def write_tar(entries):
    """A tar of (name, bytes) files; instead of bytes, the name of a type in ``tarfile``."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = getattr(tarfile, data), "target"
                tar.addfile(info)
    return io.BytesIO(out.getvalue())


def read_all(entries, limits=Limits()):
    """Every sample and reject of a tar; asserts that its accounting closes."""
    file = write_tar(entries)
    members = list_members(file, num_bytes=len(file.getvalue()))
    groups, rejects, set_aside = group_members(members)
    decoded = [decode_sample(file, group, limits=limits) for group in groups]
    samples = [sample for sample in decoded if isinstance(sample, Sample)]
    rejects += [reject for reject in decoded if isinstance(reject, Reject)]
    stored = sum(len(group.members) for group in groups) - sum(
        reject.num_members for reject in decoded if isinstance(reject, Reject)
    )
    rejected = sum(reject.num_members for reject in rejects)
    num_members = sum(member.kind != "directory" for member in members)
    assert stored + rejected + len(set_aside) == num_members
    return samples, rejects


def only_reject(entries, limits=Limits()):
    samples, rejects = read_all(entries, limits)
    assert samples == []
    assert len(rejects) == 1
    return rejects[0]


def test_a_whole_sample():
    (sample,), rejects = read_all(whole("x/a", json=make_text(" red car\n", "sky")))
    assert rejects == []
    assert sample.key == "x/a"
    assert sample.phrases == ("red car", "sky")
    assert sample.image_sha256 == hashlib.sha256(IMAGE).hexdigest()
    np.testing.assert_array_equal(sample.image, RGB)
    np.testing.assert_array_equal(sample.masks, [make_mask(0), make_mask(1)])


def test_members_in_any_order_and_extensions_in_any_case():
    entries = [(name.replace("json", "JSON"), data) for name, data in whole()][::-1]
    (sample,), rejects = read_all(entries)
    assert (sample.phrases, rejects) == (("red car", "sky"), [])
    np.testing.assert_array_equal(sample.masks[0], make_mask(0))


def test_eleven_masks_are_in_the_order_of_their_numbers():
    masks = {f"mask{i}.png": MASKS[i % 3] for i in range(11)}
    text = make_text(*map(str, range(11)))
    entries = whole(json=text, **{**masks, "mask10.png": MASKS[2]})
    (sample,), _ = read_all(sorted(entries))
    np.testing.assert_array_equal(sample.masks[2], make_mask(2))
    np.testing.assert_array_equal(sample.masks[10], make_mask(2))


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "webp"])
def test_image_formats(extension):
    data = encode(RGB, "WEBP" if extension == "webp" else "JPEG")
    (sample,), rejects = read_all(whole(png=None, **{extension: data}))
    assert (sample.image.shape, rejects) == ((HEIGHT, WIDTH, 3), [])


def test_directories_are_not_counted():
    samples, rejects = read_all([("d/", "DIRTYPE"), *whole("d/a")])
    assert (len(samples), rejects) == (1, [])


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("README.md", b"x", "unexpected_member"),
        ("README", b"x", "unexpected_member"),
        (".jpg", IMAGE, "unexpected_member"),
        ("a.npy", b"x", "unexpected_member"),
        ("a.pkl", b"x", "unexpected_member"),
        ("a.pth", b"x", "unexpected_member"),
        ("a.mask01.png", MASKS[0], "unexpected_member"),
        ("a.mask123456.png", MASKS[0], "unexpected_member"),
        ("a.mask٣.png", MASKS[0], "unexpected_member"),
        ("a.b.json", b"{}", "unexpected_member"),
        ("a.cls", "SYMTYPE", "not_a_file"),
        ("a.mask2.png", "SYMTYPE", "not_a_file"),
        ("a.jpg", "LNKTYPE", "not_a_file"),
        ("a.jpg", "CHRTYPE", "not_a_file"),
        ("a.jpg", "FIFOTYPE", "not_a_file"),
        ("/a.jpg", IMAGE, "unsafe_name"),
        ("../a.jpg", IMAGE, "unsafe_name"),
        ("x/../../a.jpg", IMAGE, "unsafe_name"),
        ("a\n.jpg", IMAGE, "unsafe_name"),
        ("a\x1b[2J.jpg", IMAGE, "unsafe_name"),
        ("a\x85.jpg", IMAGE, "unsafe_name"),
        ("\udcff.jpg", IMAGE, "unsafe_name"),
        ("x" * 252 + ".jpg", IMAGE, "unsafe_name"),
        ("é" * 126 + ".jpg", IMAGE, "unsafe_name"),
    ],
)
def test_a_member_is_rejected_alone_and_its_sample_stays(name, data, reason):
    entries = whole()
    samples, (reject,) = read_all([*entries[:2], (name, data), *entries[2:]])
    assert [sample.key for sample in samples] == ["a"]
    assert (reject.level, reject.reason) == ("member", reason)
    assert reject.name.isprintable()
    reject.name.encode()


@pytest.mark.parametrize(
    ("entries", "keys"),
    [
        (whole("/data/a") + whole("/data/b"), ["/data/a", "/data/b"]),  # as tar -P writes them
        (whole("../a"), ["../a"]),
        ([(f"{name}\r", data) for name, data in whole()], ["a"]),  # of a list with CRLF
        ([(name, "SYMTYPE") for name, _ in whole("a") + whole("b")], ["a", "b"]),
        ([(name, "LNKTYPE") for name, _ in whole()], ["a"]),
        ([("data", "SYMTYPE")], ["data"]),  # a link to the folder that was meant
        ([("x/shard.tar", b"x"), ("b.TAR.GZ", b"x")], ["x/shard", "b"]),
        ([("a.heic", IMAGE), ("b.tiff", b"x")], ["a", "b"]),
        ([("/a.txt", b"x"), *whole("/a")], ["/a"]),
    ],
)
def test_members_that_are_all_refused_are_rejected_as_samples(entries, keys):
    """So the tar does not count as one that held none, of which nothing is to be stored."""
    _, rejects = read_all([("d/", "DIRTYPE"), *entries])
    assert [reject.name for reject in rejects if reject.level == "sample"] == keys


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "/abs/notes.txt", ".a.jpg", "x.pkl"])
def test_what_is_no_sample_by_its_name_stays_a_member(name):
    _, rejects = read_all([(name, b"x")])
    assert [reject.level for reject in rejects] == ["member"]


@pytest.mark.parametrize("name", ["a\0.jpg", "", "a.jpg/"])
def test_names_that_tarfile_does_not_write(name):
    text = Member("other.json", "file", 512, 1)
    samples, (reject, _), _ = group_members([Member(name, "file", 512, 1), text])
    assert samples == []
    assert (reject.level, reject.reason) == ("member", "unsafe_name")


def test_names_at_the_limit_are_kept():
    (sample,), rejects, _ = group_members([Member("é" * 125 + "x.jpg", "file", 512, 1)])
    assert (sample.key, rejects) == ("é" * 125 + "x", [])


def test_a_name_in_a_reject_is_printable():
    reject = Reject("a\n\udcff\x1b", "member", RejectReason.UNSAFE_NAME, "x\u2028y" + "z" * 9999)
    assert reject.name == r"a\n\udcff\x1b"
    assert reject.detail.startswith(r"x\u2028yzzz")
    assert len(reject.detail) < 2000


def test_a_rejected_pair_accounts_for_no_member():
    assert Reject("a: sky", "pair", RejectReason.OUTSIDE_VIEW, "x").num_members == 0


@pytest.mark.parametrize(
    ("entries", "reason", "detail"),
    [
        ([*whole(), ("a.json", b"{}")], "duplicate_member", "5 members, of which 4 differ"),
        ([*whole(), ("a.JSON", b"{}")], "duplicate_member", "5 members, of which 4 differ"),
        ([*whole(), ("a.png", IMAGE)], "duplicate_member", "5 members, of which 4 differ"),
        ([*whole(), ("a.mask0.PNG", MASKS[0])], "duplicate_member", "of which 4 differ"),
        ([*whole(), ("a.jpg", IMAGE)], "several_images", "got 2"),
        (whole(png=None), "no_image", "got 0"),
        (whole(json=None), "bad_text", "with one for each of 2 masks, got none"),
        (whole(json=b"{}"), "bad_text", "with one for each of 2 masks, got none"),
        (whole(mask0_png=None), "missing_mask", "expected mask0.png, got 1 other"),
        (whole(mask1_png=None), "missing_mask", "expected no masks or 2, one a phrase, got 1"),
        (whole(mask2_png=MASKS[2]), "bad_mask", "expected no masks or 2, one a phrase, got 3"),
        (whole(mask3_png=MASKS[2]), "missing_mask", "expected mask2.png, got 3 other"),
        (whole(png=IMAGE[:-20]), "bad_image", "a.png: PNG chunk"),
        (whole(png=b""), "bad_image", "a.png: expected JPEG or PNG or WEBP, got no"),
        (
            whole(png=encode(RGB, "GIF")),
            "bad_image",
            "a.png: expected JPEG or PNG or WEBP, got GIF",
        ),
        (whole(mask1_png=MASKS[1][:-20]), "bad_mask", "a.mask1.png: PNG chunk"),
        (whole(mask1_png=encode(make_mask(0).T)), "mask_size", "expected 8x6 as the image is"),
        (whole(mask1_png=encode(make_mask([]))), "empty_mask", "a.mask1.png: every pixel is 0"),
    ],
)
def test_a_sample_is_rejected_whole(entries, reason, detail):
    reject = only_reject(entries)
    assert (reject.name, reject.level, reject.reason) == ("a", "sample", reason)
    assert detail in reject.detail
    assert reject.num_members == len(entries)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "WebP"])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_the_bytes_decide_the_format_and_not_the_name(image_format, extension):
    data = encode(RGB, image_format)
    (sample,), rejects = read_all([*whole(png=None), (f"a.{extension}", data)])
    assert rejects == []
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    np.testing.assert_array_equal(sample.image, np.array(expected))


def test_a_sample_whose_mask_is_a_link_is_incomplete_too():
    samples, rejects = read_all(whole(mask1_png="SYMTYPE"))
    assert samples == []
    assert [(r.level, r.reason) for r in rejects] == [
        ("member", "not_a_file"),
        ("sample", "missing_mask"),
    ]


def test_the_members_of_a_key_may_stand_anywhere():
    """As a tar has them whose folder was listed in no order, or that members were added to."""
    a, b, c = whole("a"), whole("b", json=make_text("tree", "sea")), whole("c", json=None)
    mixed = [c[0], *a[:1], *b[2:], *a[1:3], *c[1:], *b[:2], *a[3:]]
    samples, (reject,) = read_all(mixed)
    assert [(s.key, s.phrases) for s in samples] == [
        ("a", ("red car", "sky")),
        ("b", ("tree", "sea")),
    ]
    assert [s.image_sha256 for s in samples] == [hashlib.sha256(IMAGE).hexdigest()] * 2
    for sample in samples:
        np.testing.assert_array_equal(sample.masks, [make_mask(0), make_mask(1)])
    assert (reject.name, reject.reason, reject.num_members) == ("c", "bad_text", 3)


NFC, NFD = "d/caf\u00e9", "d/cafe\u0301"
KOREAN = [unicodedata.normalize(form, "한국") for form in ("NFC", "NFD")]


@pytest.mark.parametrize("image", [NFC, NFD, *KOREAN])
def test_names_in_two_unicode_forms_are_one_key_spelt_as_the_image_is(image):
    """A Mac's é is two characters. Noise is drawn from the key, so it must not be converted."""
    other = next(unicodedata.normalize(form, image) for form in ("NFC", "NFD"))
    other = other if other != image else unicodedata.normalize("NFD", image)
    assert other != image
    (_, json_, mask0, mask1) = (data for _, data in whole())
    entries = [
        (f"{other}.json", json_),
        (f"{image}.mask1.png", mask1),
        (f"{image}.png", IMAGE),
        (f"{other}.mask0.png", mask0),
    ]
    (sample,), rejects = read_all(entries)
    assert (sample.key, rejects) == (image, [])


def test_two_keys_that_look_alike_but_differ_in_more_are_two():
    """Only canonical forms are one key: ligatures, case and full width are other names."""
    keys = ["ﬁ", "fi", "Ａ", "A", "a", "K", "k"]
    samples, rejects = read_all([entry for key in keys for entry in whole(key)])
    assert ([sample.key for sample in samples], rejects) == (keys, [])


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([*whole(NFC), *whole(NFD)], "several_images"),
        ([*whole(NFC), (f"{NFD}.jpg", IMAGE)], "several_images"),
        ([*whole(NFC), (f"{NFD}.json", b"{}")], "duplicate_member"),
        ([*whole(NFC), (f"{NFD}.mask0.png", MASKS[0])], "duplicate_member"),
    ],
)
def test_a_member_in_each_of_two_forms_is_there_twice_and_the_reject_shows_both(entries, reason):
    reject = only_reject(entries)
    assert (reject.name, reject.level, reject.reason) == (NFC, "sample", reason)
    assert r"'d/cafe\u0301' and 'd/caf\xe9'" in reject.detail


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff", "JSONDecodeError"),
        (b"\x93NUMPY", "JSONDecodeError"),
        (b"\0\0\0\0", "JSONDecodeError"),
        ('{"phrases": ["a", "b"]}'.encode("utf-16")[:-1], "UnicodeDecodeError"),
        (b"[]", "with one for each of 2 masks, got none"),
        (b'[["phrases", ["a", "b"]]]', "expected {"),
        (b"{}", "with one for each of 2 masks, got none"),
        (b"\xef\xbb\xbf{}", "with one for each of 2 masks, got none"),
        (b'{"phrases": "car"}', 'strings]}, got a string, "car"'),
        (b'{"phrases": {"a": 1, "b": 2}}', 'got an object, {"a": 1, "b": 2}'),
        (b'{"phrases": []}', "got an empty list"),
        (b'{"phrases": null}', "got null"),
        (b'{"phrases": ["a", "b"], "phrases": ["c", "d"]}', 'the key "phrases" once, got it 2'),
        (b'{"phrases": ["a", "b"], "phr\\u0061ses": ["a", "b"]}', 'the key "phrases" once'),
        (b'{"phrases": ["a", "b"], "x": ' + b"[" * 100 + b"]" * 100 + b"}", "100 levels"),
        (b"[" * 900_000, "100 levels"),
        (b'{"x":' * 150_000, "100 levels"),
        (b'"' + b"\\" * 900_000, "JSONDecodeError"),
        (b'{"phrases": ["a", "b"],}', "JSONDecodeError"),
        (b'{"phrases": ["a", "b"], "x": nan}', "JSONDecodeError"),
        (make_text("a", 1), "phrase 1: expected a string"),
        (make_text("a", None), "phrase 1: expected a string"),
        (b'{"phrases": ["a", NaN]}', "phrase 1: expected a string that is not blank, got NaN"),
        (b'{"phrases": ["a", ' + b"9" * 5000 + b"]}", "phrase 1: expected a string"),
        (make_text("a", ["b"]), "phrase 1: expected a string"),
        (make_text("a", {"b": 1}), "phrase 1: expected a string"),
        (make_text("a", " \t\n\u3000"), "phrase 1: expected a string that is not blank"),
        (make_text("x" * 1001, "b"), "phrase 0: expected at most 1000 characters, got 1001"),
        (make_text("a\x00b", "b"), "phrase 0: has control characters"),
        (make_text("a\nb", "b"), "phrase 0: has control characters"),
        (make_text("a\x9bb", "b"), "phrase 0: has control characters"),
        (b'{"phrases": ["a", "\\ud800"]}', "phrase 1: has control characters, lone surr"),
        (b'{"phrases": ["caf\xe9", "b"]}', "phrase 0: has control characters, lone surrogates or"),
        (b'{"phrases": ["a\nb", "b"]}', "phrase 0: has control characters"),
        (make_text(*"x" * 1001), "1 to 1000 strings]}, got 1001 of them"),
        (b" " * (16 << 20) + make_text("a", "b"), "expected at most 16777216 bytes"),
        (b'{"phrases": ["a", "b"], "negatives": "c"}', 'strings]}, got a string, "c"'),
        (b'{"phrases": ["a", "b"], "negatives": ["c", " "]}', "negative 1: expected a string"),
        (
            b'{"phrases": ["A  b", "b"], "negatives": ["a B"]}',
            "negative 'a B': is one of the phrases too",
        ),
    ],
)
def test_bad_text(text, detail):
    reject = only_reject(whole(json=text))
    assert (reject.level, reject.reason) == ("sample", "bad_text")
    assert detail in reject.detail


GOOD = '{"phrases": ["ein Café", "b"]}'
OTHER_KEYS = [  # values of a key that nobody reads
    *(b"NaN", b"Infinity", b"-Infinity", b"null", b"1e999", b"0.1e-400", b"-0"),
    *(b"9" * 10_000, b"-" + b"9" * 100_000),
    *(b'{"y": 1, "y": 2}', b'{"phrases": [], "phrases": 3}', b'1, "x": 2'),
    *(b'"\\ud800"', b'"caf\xe9"', b'"\xed\xa0\x80"', b'"a\nb\tc\x00"'),
    *(b"[" * 99 + b"]" * 99, b'"' + b"[" * 999 + b'\\"[{"', b"[" + b"[]," * 9999 + b"1]"),
]


@pytest.mark.parametrize("value", OTHER_KEYS, ids=range(len(OTHER_KEYS)))
@pytest.mark.parametrize("first", [True, False])
def test_a_key_that_is_not_read_costs_no_sample(value, first):
    """pandas writes NaN; camera and editor metadata hold what they like."""
    entry = b'"x": ' + value
    start, end = (entry + b", ", b"") if first else (b"", b", " + entry)
    text = b"{" + start + b'"phrases": ["a", "b"]' + end + b"}"
    (sample,), rejects = read_all(whole(json=text))
    assert (sample.phrases, rejects) == (("a", "b"), [])


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
def test_text_in_the_encodings_of_unicode(encoding):
    """Windows' editors write a byte order mark, and UTF-16 as "Unicode"."""
    (sample,), rejects = read_all(whole(json=GOOD.encode(encoding)))
    assert (sample.phrases, rejects) == (("ein Café", "b"), [])


@pytest.mark.parametrize(
    "text",
    [
        b'{"phrases": ["a", "a"], "caption": null}',
        b'{"phrases": ["' + b"x" * 1000 + b'", "\\ud83d\\ude00"]}',
        b'{"phrases": ["a", "b"]}' + b" " * 1000,
        b'\r\n{"phrases":\r\n["a", "b"]}\r\n',
    ],
)
def test_text_that_is_fine(text):
    samples, rejects = read_all(whole(json=text))
    assert (len(samples), rejects) == (1, [])


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_pixels": HEIGHT * WIDTH - 1}, "image_too_large"),
        ({"max_mask_pixels": 2 * HEIGHT * WIDTH - 1}, "masks_too_large"),
        ({"max_member_bytes": len(IMAGE) - 1}, "member_too_large"),
        ({"max_text_bytes": 10}, "bad_text"),
        ({"max_phrases": 1}, "bad_text"),
        ({"max_phrase_chars": 6}, "bad_text"),
    ],
)
def test_limits(limits, reason):
    assert only_reject(whole(), Limits(**limits)).reason == reason


def test_metadata_limit():
    out = io.BytesIO()
    Image.fromarray(RGB).save(out, "PNG", icc_profile=bytes(range(256)) * 4)
    entries = whole(png=out.getvalue())
    assert only_reject(entries, Limits(max_metadata_bytes=100)).reason == "bad_image"


def test_everything_at_its_limit_is_kept():
    limits = Limits(
        max_pixels=HEIGHT * WIDTH,
        max_mask_pixels=2 * HEIGHT * WIDTH,
        max_member_bytes=max(map(len, [IMAGE, *MASKS])),
        max_text_bytes=len(make_text("red car", "sky")),
        max_phrases=2,
        max_phrase_chars=7,
    )
    samples, rejects = read_all(whole(), limits)
    assert (len(samples), rejects) == (1, [])


def test_limits_are_positive():
    with pytest.raises(ValueError, match=r"Limits\.max_pixels: must be at least 1, but got 0"):
        Limits(max_pixels=0)


def test_a_tar_that_has_shrunk_fails_the_task_not_the_sample():
    file = io.BytesIO(IMAGE[:10])
    text = Member("a.json", "file", 0, 100)
    image = Member("a.png", "file", 0, 100)
    members = SampleMembers("a", image, text, (Member("a.mask0.png", "file", 0, 5),))
    with pytest.raises(DamagedTarError, match=r"expected 100 bytes of data.* got only 10"):
        decode_sample(file, members)


def test_a_declared_size_past_the_limit_is_not_read():
    class NoReads(io.BytesIO):
        def read(self, size=-1):
            raise AssertionError(f"read {size} bytes")

    huge = Member("a.png", "file", 0, 1 << 60)
    members = SampleMembers("a", huge, Member("a.json", "file", 0, 5), ())
    reject = decode_sample(NoReads(), members)
    assert reject.reason == "member_too_large"
