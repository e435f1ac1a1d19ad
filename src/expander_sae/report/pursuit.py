"""Pictures of the pursuit experiments. Every function writes one PNG atomically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expander_sae.report import picture

Rows = Sequence[Mapping[str, Any]]
_COLOURS = ("#1b6ca8", "#b04a2f", "#3f8f4f", "#7b4ea3", "#8a6d1d", "#444444")


def plot_solvers(rows: Rows, path: str | Path, title: str) -> None:
    """Relative error against time a sample, a panel a dictionary, a colour a ``k``.

    ``rows`` have ``name``, ``k``, ``method``, ``relative_error``, ``microseconds`` and ``samples``. Readings of fewer
    samples than the others (decoders for exactly sparse data) are left out: they would flatten the rest.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    ks, whole = sorted({row["k"] for row in rows}), max(row["samples"] for row in rows)
    figure = picture.figure(6 * len(names), 5.2)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for k, colour in zip(ks, _COLOURS, strict=False):
            points = [row for row in rows if (row["name"], row["k"], row["samples"]) == (name, k, whole)]
            x, y = [row["microseconds"] for row in points], [row["relative_error"] for row in points]
            axes.errorbar(
                x,
                y,
                [row.get("relative_error_sd") or 0.0 for row in points],
                fmt="o",
                ms=5,
                color=colour,
                label=f"k = {k}",
            )
            for row in points:
                place = (row["microseconds"], row["relative_error"])
                axes.annotate(row["method"], place, textcoords="offset points", xytext=(5, 3), fontsize=6, color=colour)
        axes.set_xscale("log")
        axes.set_xlabel("µs a sample")
        axes.set_title(name)
        axes.margins(x=0.2)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative error on held-out activations")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    picture.save(figure, path)


def plot_amortisation(rows: Rows, path: str | Path, title: str) -> None:
    """Own encoder and OMP on the same dictionary, joined: relative error and CE recovered, one line an SAE.

    ``rows`` have ``name``, ``relative_error``, ``ce_recovered`` and the same with ``omp_``.
    """
    figure = picture.figure(11, 1.5 + 0.42 * len(rows))
    panels = (
        ("relative_error", "relative error (lower is better)"),
        ("ce_recovered", "CE recovered (higher is better)"),
    )
    places = range(len(rows))
    for axes, (key, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        own, best = [row[key] for row in rows], [row[f"omp_{key}"] for row in rows]
        axes.hlines(places, own, best, color="0.7", lw=3, zorder=1)
        axes.scatter(own, places, color=_COLOURS[1], label="own encoder", zorder=2)
        axes.scatter(best, places, color=_COLOURS[0], label="OMP", zorder=2)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, axis="x")
    figure.axes[0].set_yticks(list(places), [row["name"] for row in rows])
    figure.axes[0].invert_yaxis()
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    picture.save(figure, path)


def plot_block_size(rows: Rows, path: str | Path, title: str) -> None:
    """Relative error against time a sample along the block sizes, a line a device and rule, a panel a data set.

    ``rows`` have ``where``, ``data``, ``rule``, ``block``, ``microseconds`` and ``relative_error``.
    """
    kinds = list(dict.fromkeys(row["data"] for row in rows))
    lines = list(dict.fromkeys((row["where"], row["rule"]) for row in rows))
    figure = picture.figure(6 * len(kinds), 4.8)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for (where, rule), colour in zip(lines, _COLOURS, strict=False):
            line = [row for row in rows if (row["data"], row["where"], row["rule"]) == (kind, where, rule)]
            x, y = [row["microseconds"] for row in line], [row["relative_error"] for row in line]
            axes.plot(x, y, "o-" if rule == "plain" else "s--", color=colour, label=f"{where}, {rule}")
            for row in line:
                place = (row["microseconds"], row["relative_error"])
                axes.annotate(f"L={row['block']}", place, textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("µs a sample")
        axes.set_title(f"{kind} data")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative error")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    picture.save(figure, path)


def plot_dictionary_update(rows: Rows, path: str | Path, title: str) -> None:
    """FVU against seconds of learning, a panel a degree, a line a way of learning.

    ``rows`` have ``degree``, ``seed``, ``method``, ``seconds`` and ``fvu``; seeds are drawn as lines of one colour.
    """
    degrees, methods = sorted({row["degree"] for row in rows}), list(dict.fromkeys(row["method"] for row in rows))
    figure = picture.figure(6 * len(degrees), 4.8)
    for axes, degree in zip(figure.subplots(1, len(degrees), squeeze=False)[0], degrees, strict=True):
        for method, colour in zip(methods, _COLOURS, strict=False):
            for number, seed in enumerate(sorted({row["seed"] for row in rows})):
                line = [row for row in rows if (row["degree"], row["method"], row["seed"]) == (degree, method, seed)]
                label = method if number == 0 else None
                axes.plot([r["seconds"] for r in line], [r["fvu"] for r in line], "o-", ms=4, color=colour, label=label)
        axes.set_xscale("log")
        axes.set_xlabel("seconds of learning")
        axes.set_title(f"d = {degree}")
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel("FVU on held-out activations")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(title)
    picture.save(figure, path)
