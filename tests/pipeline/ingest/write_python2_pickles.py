# -*- coding: utf-8 -*-
# ruff: noqa
"""Writes python2_pickles.json anew, with Python 2.7: plain data as RefCOCO's files have it.

python2.7 tests/pipeline/ingest/write_python2_pickles.py > tests/pipeline/ingest/python2_pickles.json
"""

import cPickle
import json
import pickle

DATA = [
    {
        "ref_id": 1,
        "ann_id": eval("10L"),
        "image_id": 2**33,
        "split": "val",
        "area": 1.5,
        "flags": (True, None),
        "sentences": [
            {"sent_id": 0, "raw": 'caf\xc3\xa9 "left"', "sent": "caf\xe9 left", "tokens": []},
            {
                "sent_id": 1,
                "raw": "the kid\x92s hat",
                "sent": "kids hat",
                "tokens": ["kids", "hat"],
            },
        ],
    }
]

if __name__ == "__main__":
    made = [
        m.dumps(DATA, p).encode("base64").replace("\n", "")
        for m in (pickle, cPickle)
        for p in (0, 1, 2)
    ]
    print(json.dumps(made, indent=0))
