"""The SAEs that are compared: expanders and dense controls of the same number of values, as settings by name."""

from __future__ import annotations

from typing import Any

PURSUITS: dict[str, dict[str, Any]] = {
    "pursuit": {"preset": "pursuit"},
    "pursuit-nonneg": {"preset": "pursuit", "encoder_options": {"nonnegative": True}},
}
"""Ways to train and read by pursuit: with signed codes, which reconstruct best, and with codes of one sign."""


def matched_width(d_in: int, d_sae: int, degree: int) -> int:
    """Features ``n' = d·n/m`` of a dense dictionary that learns as many values as the expander."""
    return max(1, degree * d_sae // d_in)


def arms(
    d_in: int, d_sae: int, k: int, degrees: tuple[int, ...], *, preset: str = "modern"
) -> dict[str, dict[str, Any]]:
    """Every dictionary under every encoder, by name: ``expander-d7``, ``expander-d7-pursuit``, ….

    The dictionaries: an expander for each degree, a dense one as wide, and for each degree a dense one of matched
    storage. The plain name has a TopK encoder trained with ``preset``, tied but for the wide dense one; the others are
    trained and read as :data:`PURSUITS` says.
    """
    shapes: dict[str, dict[str, Any]] = {}
    for degree in degrees:
        shapes[f"expander-d{degree}"] = {"dictionary": "expander", "d_sae": d_sae, "degree": degree, "k": k}
    shapes[f"dense-n{d_sae}"] = {"dictionary": "dense", "d_sae": d_sae, "k": k}
    for degree in degrees:
        width = matched_width(d_in, d_sae, degree)
        shapes[f"dense-n{width}"] = {"dictionary": "dense", "d_sae": width, "k": min(k, width)}
    chosen: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        chosen[name] = {"preset": preset, **shape}
        if name == f"dense-n{d_sae}":
            chosen[name] |= untied(preset)
        for way, settings in PURSUITS.items():
            chosen[f"{name}-{way}"] = settings | shape
    return chosen


def untied(preset: str) -> dict[str, Any]:
    """An encoder with columns of its own, as a dense SAE of full width is usually trained."""
    # Its small entries want smaller steps: the best of 2e-3, 4e-3, 8e-3 for the preset, over 750 steps.
    return {"encoder": "untied"} | ({"lr": 4e-3} if preset == "modern" else {})
