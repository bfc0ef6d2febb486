"""Golden tars from img2dataset itself: it downloads a few pictures from a server on this machine.

    python tests/golden/make_img2dataset.py IMG2DATASET [--out FOLDER]

IMG2DATASET is the program of an environment with ``pip install img2dataset pillow`` (1.47.0 under
Python 3.11 here), and this is run by the Python of that environment. FOLDER, by default that of
the committed files, gets three folders: ``bordered``, img2dataset's defaults (256 px with white
borders, as JPEG); ``kept``, ``--disable_all_reencoding``, which stores any bytes as ``.jpg``;
``resized``, as DataComp's own script calls it (``uid``, long shard names, no borders, WebP here).

Of each list some addresses are dead. The bytes of a run depend on its hour and its threads: the
tests compare with the committed files and never make them anew.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

GOLDEN = Path(__file__).parent / "img2dataset"
PORT = 8017  # stands in the committed JSON
CAPTIONS = {
    "gone.jpg": "A picture that is gone",
    "lake.png": "Ein See\n\nFoto:\tN. N., über dem « Möwen » kreisen \N{WATER WAVE}",
    "page.jpg": "A page in place of a picture",
    "sea.webp": None,
    "wide.jpg": "a long caption; " * 70,
    "turned.jpg": "A picture that lies on its side",
}
RUNS = {
    "bordered": ["--number_sample_per_shard=4"],
    "kept": ["--disable_all_reencoding=True"],
    "resized": [
        *("--resize_mode=keep_ratio_largest", "--resize_only_if_bigger=True", "--image_size=192"),
        *("--encode_format=webp", "--encode_quality=90", "--oom_shard_count=8"),
        '--save_additional_columns=["uid"]',
    ],
}


def draw(width, height, shift):
    """Draw three stripes, which pack into a few kB at any size."""
    image = Image.new("RGB", (width, height), (255 - shift, shift, 90))
    image.paste((240, 40, shift), (0, 0, width // 3, height))
    image.paste((20, shift, 200), (width // 2, 0, width, height))
    return image


def write_pictures(folder):
    turned = Image.Exif()
    turned[0x0112] = 6
    draw(64, 80, 90).quantize(16, dither=Image.Dither.NONE).save(folder / "lake.png")
    draw(90, 90, 140).save(folder / "sea.webp", quality=90)
    draw(320, 100, 10).convert("L").save(folder / "wide.jpg", quality=90)
    draw(80, 60, 250).save(folder / "turned.jpg", quality=90, exif=turned)
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>Not here.</body></html>")


def write_list(path):
    rows = [
        {
            "url": f"http://127.0.0.1:{PORT}/{name}",
            "caption": caption,
            "uid": hashlib.md5(name.encode()).hexdigest(),
        }
        for name, caption in CAPTIONS.items()
    ]
    path.write_text(json.dumps(rows))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(folder)
        write_list(folder / "list.json")
        handler = partial(SimpleHTTPRequestHandler, directory=name)
        server = ThreadingHTTPServer(("127.0.0.1", PORT), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for run, options in RUNS.items():
            shutil.rmtree(arguments.out / run, ignore_errors=True)
            command = [
                *(arguments.program, f"--url_list={folder / 'list.json'}", "--input_format=json"),
                *("--caption_col=caption", "--output_format=webdataset", "--thread_count=2"),
                *(f"--output_folder={arguments.out / run}", *options),
            ]
            subprocess.run(command, check=True)
        server.shutdown()


if __name__ == "__main__":
    main()
