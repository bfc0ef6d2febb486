"""A dry run says of a tar what encode would make of it, and needs neither store nor weights."""

import io
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from jobs.__main__ import app
from pipeline.encode.dry_run import NUM_DECODED
from pipeline.store.store import Store
from tests.support.plain_tar import write_tar
from tests.support.web_tars import KINDS, draw


def save_mask(columns):
    mask = np.zeros((72, 80), bool)
    mask[20:50, columns] = True
    out = io.BytesIO()
    Image.fromarray(mask).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def mixed(tmp_path):
    """Masks, negatives, ignore, caption, image alone, each kind of what is not stored."""
    document = {"phrases": ["dog", "edge"], "negatives": ["cat"], "task_id": ["1", "2"], "key": 7}
    members = {
        "a.jpg": draw(1),
        "a.json": json.dumps(document).encode(),
        "a.mask0.png": save_mask(slice(20, 50)),
        "a.mask1.png": save_mask(0),  # beside the centre crop
        "a.ignore.png": save_mask(slice(0, 9)),
        "b.jpg": draw(2, "PNG"),
        "b.txt": b"two\nlines " * 200,
        "b.json": b'{"uid": 9}',
        "c.jpg": b"<html>",
        "d.webp": draw(3, "WEBP"),
        "n.pkl": b"1",
        "._a.jpg": b"1",
        "e.cls": b"1",
    }
    return write_tar(tmp_path / "mixed.tar", members)


@pytest.fixture
def spec_file(tmp_path, ldm_folder):
    """A spec whose model has its tokenizer and configs, and no weights."""
    without = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(ldm_folder, tmp_path / "ldm", ignore=without)
    return write_spec(tmp_path, tmp_path / "ldm")


def write_spec(folder, model, **fields):
    latents = {"model": str(model), "size": 64, "keep_json": ["uid", "task_id"], **fields}
    path = folder / "spec.yaml"
    path.write_text(json.dumps({"latents": latents}))
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["encode", "--dry-run", *map(str, arguments)])
    return result.exit_code, [" ".join(line.split()) for line in result.output.splitlines()]


def test_all_that_a_mixed_tar_holds_is_said(mixed, spec_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    status, lines = run("--corpus", mixed, "--spec", spec_file)
    assert status == 0
    assert sorted(tmp_path.rglob("*")) == before
    long = ("two lines " * 200)[:99] + "…"
    assert lines[2:] == [
        "samples 4 by their names; 4 of them decoded, evenly spaced, and 0 only named",
        "stored 3 of 4 decoded would be stored: 2 with phrases, 1 without text, 1 with masks, "
        "1 with negatives of their own, 1 with an ignore region",
        "set aside 1 ._*: ._a.jpg",
        "set aside 1 *.cls: e.cls",
        "set aside 1 *.json of 4 decoded, of which no phrase is read: b.json",
        "rejected 1 member: unexpected_member; the first: n.pkl: expected KEY.jpg, .jpeg, .png, "
        ".webp, .json, .txt, .mask<i>.png or .ignore.png",
        "rejected 1 pair of 4 decoded: outside_view; the first: a: edge: no pixel of the mask "
        "falls into view 0, Box(left=4, top=0, right=76, bottom=72)",
        "rejected 1 sample of 4 decoded: bad_image; the first: c: c.jpg: expected JPEG or PNG or "
        "WEBP, got HTML, a server's words",
        "note 1 caption cut at 1,000 characters (column phrase)",
        "note 1 pair with a prompt that the tokenizer cut at its length (77 tokens in CLIP): what "
        "follows was not read (column prompt_cut)",
        "json keys task_id, uid (for latents.keep_json)",
        "spec 3 views, 4 pairs: 1 with a mask, 1 negative of their own",
        "sample a: JPEG 80x72, 2 masks, ignore region",
        'phrases "dog", "edge"',
        'negatives "cat"',
        "kept uid: null",
        "kept task_id: 1, 2",
        "sample b: PNG 80x72",
        f'caption "{long}"',
        "kept uid: 9",
        "kept task_id: null",
        "sample d: WEBP 80x72",
        "no text",
        "kept uid: null",
        "kept task_id: null",
    ]


def test_a_json_that_cannot_be_read_beside_a_caption_ends_nothing(tmp_path):
    members = {"f.jpg": draw(4), "f.txt": b"three", "f.json": b"{"}
    status, lines = run("--corpus", write_tar(tmp_path / "f.tar", members))
    assert status == 0
    assert "set aside 1 *.json of 1 decoded, of which no phrase is read: f.json" in lines
    assert 'caption "three"' in lines
    assert any(line.startswith("note 1 sample with a JSON beside its caption") for line in lines)


def test_what_is_said_is_what_encode_makes(mixed, ldm_folder, tmp_path):
    spec = write_spec(tmp_path, ldm_folder)
    _, lines = run("--corpus", mixed, "--spec", spec)
    store = tmp_path / "store"
    command = ["encode", "--corpus", str(mixed), "--spec", str(spec), "--store", str(store)]
    result = CliRunner().invoke(app, [*command, "--actors", "0"])
    assert result.exit_code == 0, result.output
    opened = Store.open(str(store))
    (layer,) = opened.list_layers()
    (commit,) = opened.newest_commits(layer.folder).values()
    rows, accounting = commit.rows, commit.accounting
    (said,) = [line for line in lines if line.startswith("spec ")]
    assert said.startswith(f"spec {rows['views']} views, {rows['pairs']} pairs: {rows['masks']} ")
    aside = [int(line.split()[2]) for line in lines if line.startswith("set aside ")]
    assert sum(aside) == accounting.set_aside_members == 3
    assert "set aside 3 members: sidecars" in result.output.splitlines()
    assert "3 sidecars set aside" in CliRunner().invoke(app, ["inspect", str(store)]).output
    rejects = {line.split(": ")[1].split(";")[0]: 1 for line in lines if "rejected" in line}
    assert rejects == accounting.rejects
    notes = [line.split(" ", 2)[1:] for line in lines if line.startswith("note ")]
    assert sorted(int(number) for number, _ in notes) == sorted(
        number for number in accounting.notes.values() if number
    )


def test_without_a_spec_nothing_is_said_of_views(mixed):
    status, lines = run("--corpus", mixed)
    text = "\n".join(lines)
    assert status == 0
    assert "outside_view" not in text
    assert "spec " not in text
    assert "stored 3 of 4 decoded would be stored: " in "\n".join(lines)


@pytest.mark.parametrize("model", ["/nowhere", "some/hub-id", "s3://bucket/model", "empty"])
def test_a_model_that_is_not_here_leaves_cut_prompts_uncounted(model, mixed, tmp_path):
    (tmp_path / "empty").mkdir()
    model = model if model != "empty" else tmp_path / "empty"
    status, lines = run("--corpus", mixed, "--spec", write_spec(tmp_path, model))
    assert status == 0
    start = "prompts that the tokenizer cuts are not counted: "
    (line,) = [line for line in lines if line.startswith(start)]
    assert str(model) in line
    assert not any("that the tokenizer cut at" in line for line in lines)


@pytest.mark.parametrize("name", ["datacomp", "sa1b", "images", "classes", "json"])
def test_web_tars_are_told_with_what_is_set_aside_of_them(name, tmp_path):
    web = KINDS[name]()
    status, lines = run("--corpus", web.write(tmp_path / "web.tar"))
    assert status == 0
    num = len(web.samples)
    assert f"stored {num} of {num} decoded would be stored: " in "\n".join(lines)
    aside = [int(line.split()[2]) for line in lines if line.startswith("set aside ")]
    assert sum(aside) == web.num_set_aside
    assert not any(line.startswith("rejected") for line in lines)
    assert [line.split(":")[0] for line in lines if line.startswith("sample ")] == [
        f"sample {key}" for key in [*web.samples][:3]
    ]


def test_so_many_samples_are_decoded_of_a_long_tar(tmp_path):
    picture = draw(1)
    members = {f"{number:03d}.jpg": picture for number in range(2 * NUM_DECODED + 1)}
    members["128.jpg"] = b"no picture"  # the last one, which is only named
    status, lines = run("--corpus", write_tar(tmp_path / "long.tar", members))
    assert status == 0
    assert lines[2] == (
        "samples 129 by their names; 64 of them decoded, evenly spaced, and 65 only named"
    )
    assert lines[3] == "stored 64 of 64 decoded would be stored: 64 without text"
    assert [line for line in lines if line.startswith("sample ")] == [
        f"sample {key}: JPEG 80x72" for key in ("000", "002", "004")
    ]


def test_what_cannot_be_read_or_stored_is_said_and_ends_with_3(mixed, tmp_path):
    (tmp_path / "cut.tar").write_bytes(mixed.read_bytes()[:9000])
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>")
    write_tar(tmp_path / "bad.tar", {"a.jpg": b"x", "b.npy": b"x"})
    for name, expected in (
        ("cut", r"its task would fail: tar at byte "),
        ("page", "got an HTML page"),
        ("bad", "stored nothing would be"),
    ):
        status, lines = run("--corpus", tmp_path / f"{name}.tar")
        assert status == 3
        assert expected in "\n".join(lines)
    patterns = [tmp_path / "cut.tar", mixed]
    status, lines = run(*(x for pattern in patterns for x in ("--corpus", pattern)))
    assert status == 0
    assert f"{mixed}: 1 tar, 30.7 kB" in lines


def test_a_pattern_without_a_tar_and_missing_options_are_bad_arguments(mixed, tmp_path):
    status, lines = run("--corpus", tmp_path / "none-*.tar")
    assert status == 2
    assert "found none" in lines[0]
    (tmp_path / "folder.tar").mkdir()
    (tmp_path / "old.tar").symlink_to(tmp_path / "gone")
    status, lines = run("--corpus", tmp_path / "[fo]*.tar")
    assert status == 2
    assert "no tar can be read" in lines[0]
    status, lines = run("--corpus", tmp_path / "*.tar")
    assert status == 0
    assert [line.startswith("cannot be read (2): ") for line in lines[1:3]] == [True, True]
    assert run()[0] == 2
    result = CliRunner().invoke(app, ["encode", "--corpus", str(mixed)])
    assert result.exit_code == 2
    assert "expected --store and --spec" in result.output


def test_a_remote_tar_is_fetched_once(mixed, tmp_path, monkeypatch):
    asked = []
    data = mixed.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(b"")

        def do_GET(self):
            asked.append(self.headers.get("Range"))
            self.answer(data)

        def answer(self, body):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        status, lines = run("--corpus", f"http://127.0.0.1:{server.server_port}/mixed.tar")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert status == 0
    assert "stored 3 of 4 decoded would be stored: " in "\n".join(lines)
    assert asked == [None]
    assert list(scratch.iterdir()) == []
