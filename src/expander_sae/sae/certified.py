"""The certificate that is kept with an SAE. Theory brings scipy along: it is imported only where there is one."""

from __future__ import annotations

from typing import Any

from expander_sae.dictionary import Dictionary

Stored = dict[str, Any] | None


def current(certificate: Stored, dictionary: Dictionary) -> dict[str, Any]:
    """The entry of a config: empty without a certificate, or where it is of another dictionary than this."""
    if certificate is None:
        return {}
    from expander_sae.theory.certificates import is_of

    return {"certificate": certificate} if is_of(certificate, dictionary) else {}


def checked(certificate: Stored, dictionary: Dictionary) -> Stored:
    """The certificate of a config. Raises ``ValueError`` for one of another dictionary than this."""
    if certificate is not None and not current(certificate, dictionary):
        raise ValueError(
            f"the certificate is of another dictionary: it names the hash {certificate.get('sha256')}; take the "
            "section out, or certify this one"
        )
    return certificate


def under_another_encoder(certificate: Stored) -> Stored:
    """What of a certificate does not depend on the codes."""
    if certificate is None:
        return None
    from expander_sae.theory.certificates import without_codes

    return without_codes(certificate)
