"""A part of a page that shows one head at a time: choose a map and a head, point at a query. Knows no pictures.

Weights go into the page rounded to 1/255. What runs in the browser is evals/viewer.html.
"""

import base64
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from evals.attention_maps import AttentionMap


def viewer(maps: Sequence[AttentionMap], *, map: int = 0, head: int = 0, query: int = 0) -> str:
    """HTML and a script, opened at one head and one query."""
    found = {"maps": [_plain(one) for one in maps], "map": map, "head": head, "query": query}
    data = json.dumps(found, ensure_ascii=False).replace("<", "\\u003c")  # no label can end the script
    template = pathlib.Path(__file__).with_name("viewer.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", data)


def _plain(map: AttentionMap) -> dict[str, object]:
    weights = np.rint(np.clip(map.weights, 0, 1) * 255).astype(np.uint8)
    heads, *_ = weights.shape
    return {
        "title": map.title,
        "heads": heads,
        "queries": map.queries,
        "keys": map.keys,
        "weights": base64.b64encode(weights.tobytes()).decode(),
    }
