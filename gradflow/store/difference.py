"""In which fields two settings differ, in words."""

import itertools
import json
import math
from typing import Any


# What may differ between a study and its continuation: where it runs, and where its
# data lie.
FREE = frozenset({"device", "images"})
# Numbers computed from data differ by so much from one kind of hardware to another.
ROUNDING = {"float64": 1e-9, "float32": 1e-4}


def differences(
    saved: Any, asked: Any, where: str = "", skip: frozenset[str] = FREE
) -> list[str]:
    """Each field in which two settings (what JSON has) differ.

    Draws may be raised. Under "arrays" numbers are compared up to rounding, and "code"
    is a list of lines of which the first that differs is shown.
    """
    if where.startswith("arrays.") and alike(saved, asked):
        return []
    nested = isinstance(saved, dict) and isinstance(asked, dict)
    if nested and not where.startswith("arrays."):
        differ = []
        for name in {**saved, **asked}:
            one, other = saved.get(name), asked.get(name)
            if name in skip or (name == "draws" and _raised(one, other)):
                continue
            inner = f"{where}.{name}" if where not in ("", "settings") else name
            differ += differences(one, other, inner, skip)
        return differ
    if saved == asked:
        return []
    if where == "code" and isinstance(saved, list) and isinstance(asked, list):
        pairs = itertools.zip_longest(saved, asked, fillvalue="nothing")
        saved, asked = next(pair for pair in pairs if pair[0] != pair[1])
    note = " (draws can be raised only)" if where == "draws" else ""
    name = where.removeprefix("arrays.")
    return [f"{name}: saved {_shown(saved)}, asked {_shown(asked)}{note}"]


def alike(saved: Any, asked: Any) -> bool:
    """Whether two arrays' summaries (`outcome.summary`) are equal up to rounding."""
    if not (isinstance(saved, dict) and isinstance(asked, dict)):
        return False
    if (saved.get("of"), saved.get("shape")) != (asked.get("of"), asked.get("shape")):
        return False
    tolerance = ROUNDING.get(str(saved["of"]), 0.0)
    numbers = [(saved[name], asked[name]) for name in ("norm", "direction")]
    scale = max((abs(n) for n in numbers[0] if isinstance(n, float)), default=0.0)
    return all(
        one == other
        or isinstance(one, float)
        and isinstance(other, float)
        and math.isclose(one, other, rel_tol=0.0, abs_tol=tolerance * scale)
        for one, other in numbers
    )


def _raised(saved: Any, asked: Any) -> bool:
    whole = (isinstance(n, int) and not isinstance(n, bool) for n in (saved, asked))
    return all(whole) and asked >= saved


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "direction" in value:
        if value["shape"] == []:
            return f"{value['direction']!r}"
        shape = " x ".join(map(str, value["shape"]))
        return f"{shape} {value['of']} of norm {value['norm']:.6g}"
    text = value.strip() if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
