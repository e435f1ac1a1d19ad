"""``expander-sae certify``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expander_sae.cli.app import app

if TYPE_CHECKING:
    from expander_sae.theory import Certificate, CodeSurvey

_DEFAULT_K = 64  # of a mask alone


@app.command(
    epilog="Examples:\n\n[bold]expander-sae certify runs/demo/expander-d7 --store acts/heldout --save[/bold]\n\n"
    "[bold]expander-sae certify --mask left-regular --d-in 512 --d-sae 4096 --degree 7 --k 64[/bold]"
)
def certify(
    place: Annotated[
        str | None, typer.Argument(metavar="[SAE]", help="An SAE folder, a Hub id, a checkpoint or an unfinished run.")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="In place of an SAE: flat columns on a mask of this kind, such as left-regular.")
    ] = None,
    d_in: Annotated[int | None, typer.Option(help="Rows of the mask.")] = None,
    d_sae: Annotated[int | None, typer.Option(help="Columns of the mask.")] = None,
    degree: Annotated[int | None, typer.Option(help="Rows each column of the mask uses.")] = None,
    seed: Annotated[int, typer.Option(help="Of the mask; of the search, the rows and the noise.")] = 0,
    k: Annotated[
        int | None, typer.Option(help=f"Active features; default the SAE's own, of a mask {_DEFAULT_K}.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Activation store, held out: measures the SAE's codes, and plants them under noise."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Activations to draw from the store.")] = 1024,
    save: Annotated[bool, typer.Option("--save", help="Keep the certificate in the SAE's folder.")] = False,
    json_: Annotated[Path | None, typer.Option("--json", help="Also write it as JSON here.")] = None,
) -> None:
    """What is guaranteed for a dictionary: for which k every code is unique and found by OMP.

    Exact coherence from the sparse Gram matrix, expansion exact for small sets of columns and bracketed beyond, the
    paper's conditions R_id and R_OMP at both ends of the bracket. Columns are taken at unit norm.

    With --store also what holds token by token on the SAE's own codes (exact recovery coefficient, singular values,
    rows covered, coefficients against noise) and how well each of these tells whether OMP finds a planted code again.

    docs/theory.md states every definition and theorem.
    """
    from expander_sae import files
    from expander_sae.theory import one_line, verdict

    if (place is None) == (mask is None):
        raise ValueError("give an SAE, or --mask with --d-in, --d-sae and --degree: one of the two")
    if place is None:
        if save or store:
            raise ValueError("--store and --save need an SAE: a mask alone has no codes and no folder")
        certificate = _of_mask(str(mask), {"d_in": d_in, "d_sae": d_sae, "degree": degree}, seed, k)
    else:
        if given := [name for name, value in (("d-in", d_in), ("d-sae", d_sae), ("degree", degree)) if value]:
            raise ValueError(f"--{given[0]} is of a mask; an SAE has its own")
        certificate = _of_sae(place, k, store, rows, seed, save)
    _print_levels(certificate)
    if certificate.codes is not None:
        _print_codes(certificate.codes)
    print(f"\n{verdict(certificate)}")
    if save:
        print(f"Saved in {place}: {one_line(certificate)}.")
    if json_:
        files.atomic_write_json(files.user_path(json_), certificate.to_dict())


def _of_mask(kind: str, sizes: dict[str, int | None], seed: int, k: int | None) -> Certificate:
    from expander_sae.mask import Mask
    from expander_sae.theory import certify

    known = {name: value for name, value in sizes.items() if value is not None}
    if missing := sorted(sizes.keys() - known.keys()):
        raise ValueError(f"a mask needs --{missing[0].replace('_', '-')}")
    drawn = Mask.build(kind, **known, seed=seed)
    return certify(drawn, min(_DEFAULT_K, drawn.d_sae) if k is None else k, seed=seed)


def _of_sae(place: str, k: int | None, store: Path | None, rows: int, seed: int, save: bool) -> Certificate:
    from expander_sae import files
    from expander_sae.data import ActivationStore
    from expander_sae.evaluation import certify_sae
    from expander_sae.sae.folder import CONFIG_NAME
    from expander_sae.training import load_sae

    folder = files.user_path(place)
    if save and not (folder / CONFIG_NAME).exists():
        raise ValueError(f"--save writes into an SAE folder, and {place} is none")
    sae = load_sae(place)
    source = None if store is None else ActivationStore.open(files.user_path(store))
    name = "" if source is None else source.manifest.meta.text
    certificate = certify_sae(sae, k=k, source=source, name=name, rows=rows, seed=seed)
    if save:
        sae.certificate = certificate.to_dict()
        sae.save_pretrained(folder)
    return certificate


def _print_levels(certificate: Certificate) -> None:
    from expander_sae.report.table import Column, number, print_table
    from expander_sae.theory import QUANTILES, levels, shown_ends

    sizes = f"{certificate.d_in:,} x {certificate.d_sae:,}"
    degree = "dense" if certificate.degree is None else f"d={certificate.degree}"
    mu = certificate.coherence.mu
    print(f"{sizes}, {degree}; coherence μ = {mu if mu else 0}{'' if isinstance(mu, float) else f' = {float(mu):.3f}'}")
    if certificate.flatness:
        shown = ", ".join(f"{value:.2f}" for value in certificate.flatness)
        share = ", ".join(f"{at:.0%}" for at in QUANTILES)
        largest = math.sqrt(float(certificate.beta_squared or 0))
        print(f"flatness β: {shown} at {share} of the columns, {largest:.2f} at most (1 is flat)")

    def ends(key: str) -> Any:
        return lambda row: shown_ends(row[key])

    columns = (
        Column("k", number("k", ",")),
        Column("μ₁(k)+μ₁(k-1)", number("recovery", ".3g")),
        Column("μ₁(2k-1)", number("uniqueness", ".3g")),
        Column("ε(2k)", ends("eps")),
        Column("R_id", ends("r_id")),
        Column("R_OMP", ends("r_omp")),
        Column("min |x| / noise", lambda row: f"{row['noise']:.3g}"),
    )
    print_table(levels(certificate), columns)
    print("Below 1 proves: μ₁(k)+μ₁(k-1) and R_OMP recovery by OMP, μ₁(2k-1) and R_id uniqueness. The last column is the "
          "ratio that OMP needs under noise.")  # fmt: skip


def _print_codes(codes: CodeSurvey) -> None:
    from expander_sae.report.table import Column, number, print_table
    from expander_sae.theory import QUANTILES

    quantiles = [
        {"name": name, **{str(at): value for at, value in zip(QUANTILES, values, strict=True)}}
        for name, values in codes.quantiles.items()
    ]
    print(f"\n{codes.tokens:,} codes of {codes.source or 'the store'}, encoder {codes.encoder}")
    heads = [Column(f"{at:.0%}", number(str(at), ".3g")) for at in QUANTILES]
    print_table(quantiles, [Column("of the tokens", lambda row: row["name"]), *heads])
    planted = []
    for one in codes.planted:
        told = {name: value for name, value in one.auc.items() if value is not None}
        best = max(told, key=told.__getitem__) if told else None
        planted.append({
            "size": one.size, "noise": one.noise, "guaranteed": one.guaranteed, "exact": one.exact, "share": one.share,
            "erc": one.auc.get("ERC"), "best": f"{told[best]:.2f} {best}" if best else "–",
        })  # fmt: skip
    columns = (
        Column("planted features", number("size", ",")),
        Column("noise / residual", number("noise", ".3g")),
        Column("guaranteed", number("guaranteed", ".1%")),
        Column("found whole", number("exact", ".1%")),
        Column("features found", number("share", ".1%")),
        Column("AUC of ERC", number("erc", ".2f")),
        Column("best AUC", lambda row: row["best"], words=True),
    )
    print()
    print_table(planted, columns)
