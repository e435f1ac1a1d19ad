"""The sparse autoencoder: a dictionary, an encoder, a sparsity rule and a decoder bias."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from expander_sae.dictionary import Basis, DenseDictionary, Dictionary, ExpanderDictionary, Matrix, dictionary_from
from expander_sae.mask import Mask
from expander_sae.ops import Selection, SparseCode
from expander_sae.ops.fused import TiedError
from expander_sae.sae import certified, folder, hub
from expander_sae.sae.encoder import ENCODERS, Encoder, TiedEncoder, UntiedEncoder, pursuit_encoder
from expander_sae.sae.sparsity import SPARSITIES, Score, Sparsity, TopK
from expander_sae.stored import Section, take_tensor

_FEATURES_AT_ONCE = 4096  # scores of them all would not fit for a wide dictionary
_KEYS = ("d_in", "d_sae", "dictionary", "encoder", "sparsity", "signed", "num_values", "num_bytes", "metadata")


class SAE(nn.Module):
    """``h ≈ ĥ = W x + b_dec`` with a sparse ``x``.

    Activations may have any leading shape ``(..., d_in)`` and any floating type; they are computed on in the SAE's
    own type and the reconstruction comes back in theirs.

    Args:
        dictionary: the columns ``W``.
        encoder: who scores.
        sparsity: who selects.
        metadata: anything that is JSON: stored with the weights and kept on every round trip. The program itself uses
            ``trained_on``, ``training`` and ``metrics``, shown on the model card.
        certificate: a certificate of the dictionary (:mod:`expander_sae.theory`) as a dictionary, stored likewise as
            long as the dictionary is the one certified: after training on it is not, and is left out.

    Raises:
        ValueError: an encoder that cannot serve the rule, or a rule that needs unit columns on a dictionary without.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        encoder: Encoder,
        sparsity: Sparsity,
        metadata: dict[str, Any] | None = None,
        certificate: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        encoder.check(sparsity.selection())
        if dictionary.held is not None and encoder.num_values:
            raise ValueError(
                f"a {encoder.kind} encoder has values of its own and needs as many rows in every column: a mask whose "
                "columns differ, such as bernoulli, is read by a tied encoder or a pursuit"
            )
        if sparsity.needs_unit_norm and not dictionary.unit_norm:
            raise ValueError(
                f"the sparsity rule {sparsity.kind!r} needs unit_norm=True: with free columns its penalty is evaded by "
                "longer columns and smaller codes"
            )
        self.dictionary = dictionary
        self.encoder = encoder
        self.sparsity = sparsity
        self.b_dec = nn.Parameter(torch.zeros(dictionary.d_in))
        self.metadata: dict[str, Any] = metadata if metadata is not None else {}
        self.certificate = certificate

    @classmethod
    def expander(
        cls,
        mask: Mask,
        k: int,
        *,
        untied: bool = False,
        relu: bool = False,
        unit_norm: bool = True,
        seed: int = 0,
        sparsity: Sparsity | None = None,
    ) -> SAE:
        """An SAE on an expander mask, ``d·n`` learned values (twice that ``untied``).

        Args:
            mask: the supports.
            k: active features per sample.
            untied: the encoder has values of its own, on the same supports.
            relu: of the TopK rule.
            unit_norm: normalise columns in the forward pass.
            seed: draws the initial values.
            sparsity: a rule in place of ``TopK(k, relu)``.

        Raises:
            ValueError: ``k`` outside ``[1, d_sae]``.
        """
        generator = torch.Generator().manual_seed(seed)
        dictionary = ExpanderDictionary(mask, unit_norm=unit_norm, generator=generator)
        rule = TopK(mask.d_sae, k, relu=relu) if sparsity is None else sparsity
        return cls(dictionary, _linear_encoder(dictionary.core().values, untied), rule)

    @classmethod
    def dense(
        cls,
        d_in: int,
        d_sae: int,
        *,
        k: int,
        untied: bool = False,
        relu: bool = False,
        unit_norm: bool = True,
        seed: int = 0,
        sparsity: Sparsity | None = None,
    ) -> SAE:
        """A dense SAE, ``m·n`` learned values (twice that ``untied``), its encoder starting at the decoder.

        Arguments as :meth:`expander`.

        Raises:
            ValueError: ``k`` outside ``[1, d_sae]``, or a size below 1.
        """
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in and d_sae must be at least 1, got {d_in} and {d_sae}")
        generator = torch.Generator().manual_seed(seed)
        dictionary = DenseDictionary.random(d_in, d_sae, unit_norm=unit_norm, generator=generator)
        rule = TopK(d_sae, k, relu=relu) if sparsity is None else sparsity
        return cls(dictionary, _linear_encoder(dictionary.values, untied), rule)

    @property
    def d_in(self) -> int:
        return self.dictionary.d_in

    @property
    def d_sae(self) -> int:
        return self.dictionary.d_sae

    @property
    def k(self) -> int:
        """Features per sample, as the sparsity rule counts them."""
        return self.sparsity.k

    @property
    def signed(self) -> bool:
        """Whether codes may hold negative values."""
        return self.encoder.signed(self.sparsity.signed)

    @property
    def dtype(self) -> torch.dtype:
        return self.b_dec.dtype

    @property
    def num_values(self) -> int:
        """Learned values: decoder, basis and (if untied) encoder; biases not counted, as in the paper."""
        return self.dictionary.num_values + self.dictionary.basis_values + self.encoder.num_values

    @property
    def num_bytes(self) -> int:
        """Bytes of everything on disk: values, supports that no recipe redraws, biases."""
        return folder.tensor_bytes(self._stored_tensors())

    def with_encoder(self, solver: str, *, k: int | None = None, **options: Any) -> SAE:
        """The same dictionary and ``b_dec`` (shared) read by a pursuit, as in ``with_encoder("omp", block=8)``.

        Args:
            solver: a name of :data:`expander_sae.pursuit.SOLVERS`, or ``"mp-unrolled"``.
            k: features per sample; default as now.
            options: the solver's.

        Raises:
            ValueError: unknown solver or option, ``k`` outside ``[1, d_sae]``.
        """
        rule = TopK(self.d_sae, self.k if k is None else k)
        # Metrics were measured under another encoder.
        metadata = {key: self.metadata[key] for key in self.metadata if key != "metrics"}
        certificate = certified.under_another_encoder(self.certificate)
        other = SAE(self.dictionary, pursuit_encoder(solver, options), rule, metadata, certificate)
        other.b_dec = self.b_dec
        return other.train(self.training)

    def encode(self, h: Tensor) -> SparseCode:
        """The code of ``h (..., d_in)``: ``indices`` int32 and ``values``, both ``(..., capacity)``.

        Raises:
            TypeError: ``h`` is not floating point.
            ValueError: wrong width, NaN or infinity in ``h``, or values too large for the SAE's type.
        """
        return self._code(self.dictionary.matrix(), self._fitting(h), check_finite=True)

    def decode(self, code: SparseCode) -> Tensor:
        """``Wx + b_dec``: ``(..., d_in)``."""
        return self.dictionary.matrix().decode(code) + self.b_dec

    def forward(self, h: Tensor) -> Tensor:
        """The reconstruction of ``h``, in its shape and type. Raises as :meth:`encode`."""
        matrix = self.dictionary.matrix()
        code = self._code(matrix, self._fitting(h), check_finite=True)
        return (matrix.decode(code) + self.b_dec).to(h.dtype)

    def squared_error(self, h: Tensor, selection: Selection | None = None) -> TiedError:
        """``mean ‖h - ĥ‖²`` over ``h (B, d_in)``, differentiable in the parameters; residual and code beside it.

        Unchecked: the training path. A tied TopK encoder on an expander takes one fused call. With a ``selection`` the
        code is what that one takes, in place of the rule.
        """
        matrix, whole = self.dictionary.matrix(), selection or self.sparsity.selection()
        fused = None if whole is None else self.encoder.fused_error(matrix, h, self.b_dec, whole)
        if fused is not None:
            return fused
        code = self._code(matrix, h) if selection is None else self.encoder(matrix, h, self.b_dec, selection)
        residual = h - (matrix.decode(code) + self.b_dec)
        return TiedError(residual.square().sum(dim=1).mean(), residual.detach(), code)

    @torch.no_grad()
    def begin(self, h: Tensor) -> None:
        """Let the sparsity rule start from a sample ``h (B, d_in)`` of the activations to train on, if it wants to."""
        if not self.sparsity.wants_start:
            return
        matrix, bias = self.dictionary.matrix(), self.encoder.bias()
        assert bias is not None, "an encoder without a bias has been refused"
        rank = min(max(1, round(len(h) * self.k / self.d_sae)), len(h) - 1)
        cuts = [  # halfway between two scores, so that rounding decides nothing
            self.encoder.scores(features, matrix, h, self.b_dec).topk(rank + 1, dim=0).values[-2:].mean(dim=0)
            for features in torch.arange(self.d_sae, device=bias.device).split(_FEATURES_AT_ONCE)
        ]
        unit = (h.double() - h.double().mean(dim=0)).square().mean().sqrt()
        self.sparsity.begin(float(unit), torch.cat(cuts), bias)

    def reconstruct_with(self, h: Tensor, features: Tensor, k: int) -> Tensor:
        """What the named features alone make of ``h``, ``k`` of them per sample and without ``b_dec``: for AuxK."""
        matrix = self.dictionary.matrix()
        code = self.encoder.code_among(features, matrix, h, self.b_dec, self.sparsity.among(k))
        return matrix.subset(features).decode(code)

    def frozen_error(self, h: Tensor, code: SparseCode) -> Tensor:
        """``mean ‖h - ĥ‖²`` of another code of ``h (B, d_in)``, with dictionary and ``b_dec`` held still."""
        guess = self.dictionary.matrix().detach().decode(code) + self.b_dec.detach()
        return (h - guess).square().sum(dim=1).mean()

    @torch.no_grad()
    def reset_features(self, features: Tensor, targets: Tensor, norm: float = 1.0) -> None:
        """Re-aim features ``(f,)`` at ``targets (f, d_in)``, each restricted to its column's support.

        ``norm`` is that of the raw values: see :meth:`~expander_sae.dictionary.Dictionary.point_at`.
        """
        self.dictionary.point_at(features, targets, norm)
        self.encoder.reset_features(features, self.dictionary.core())
        self.sparsity.reset_features(features, self.encoder.bias())

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Turn an SAE of ``factor · h`` into the SAE of ``h`` with the same supports and codes ``/ factor``.

        Exact: the rules commute with a positive factor, so only biases and thresholds (and nothing in ``W``) change.
        """
        self.b_dec /= factor
        self.encoder.rescale_(factor)
        self.sparsity.rescale_(factor)

    @torch.no_grad()
    def leave_basis_(self) -> Basis | None:
        """Turn an SAE of ``h`` into that of the coordinates ``Rᵀh`` and return the basis, if there is one.

        Norms do not change, so training may go on there: on batches rotated once, at the speed of the sparse part.
        """
        basis = self.dictionary.basis
        if basis is not None:
            self.b_dec.copy_(basis.coordinates(self.b_dec))
            self.dictionary.basis = None
        return basis

    @torch.no_grad()
    def enter_basis_(self, basis: Basis | None) -> None:
        """The inverse of :meth:`leave_basis_`: an SAE of coordinates in ``basis`` becomes that of the vectors.

        Raises:
            ValueError: a basis of another width, or the SAE has one.
        """
        if basis is None:
            return
        if basis.d_in != self.d_in or self.dictionary.basis is not None:
            has = "has a basis" if self.dictionary.basis is not None else f"reads d_in = {self.d_in}"
            raise ValueError(f"a basis of width {basis.d_in} does not fit an SAE that {has}")
        self.dictionary.basis = basis.to(self.b_dec.device)
        self.b_dec.copy_(basis.vectors(self.b_dec))

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds beside format, file hashes and its own hash (docs/formats.md)."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dictionary": self.dictionary.config(),
            "encoder": self.encoder.config(),
            "sparsity": self.sparsity.config(),
            **certified.current(self.certificate, self.dictionary),
            "signed": self.signed,
            "num_values": self.num_values,
            "num_bytes": self.num_bytes,
            "metadata": self.metadata,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Rebuild from :meth:`config` and the stored tensors, in evaluation mode.

        Raises:
            ValueError: an entry or a tensor that is missing, not known, or does not fit; it is named.
        """
        whole = Section(config, "config")
        whole.only(*_KEYS, "certificate")
        d_in, d_sae = whole.integer("d_in"), whole.integer("d_sae")
        b_dec = take_tensor(tensors, "b_dec", (d_in,))
        dictionary = dictionary_from(whole.section("dictionary"), _named(tensors, ""), d_in, d_sae)
        part = whole.section("encoder")
        encoder = part.kind(ENCODERS).from_config(part, _named(tensors, "encoder."), dictionary)
        part = whole.section("sparsity")
        sparsity = part.kind(SPARSITIES).from_config(part, _named(tensors, "sparsity."), d_sae)
        stored = whole.mapping("certificate") if "certificate" in whole else None
        certificate = certified.checked(stored, dictionary)
        sae = cls(dictionary, encoder, sparsity, whole.mapping("metadata"), certificate)
        sae.b_dec = nn.Parameter(b_dec)
        if extra := sorted(tensors.keys() - sae._stored_tensors().keys()):
            raise ValueError(f"the tensor {extra[0]!r} belongs to no part of this SAE")
        return sae.eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json`` and ``sae.safetensors`` into a folder (made if needed), in one atomic change."""
        folder.write(path, self.config(), self._stored_tensors())

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load a folder or a Hub repository, in evaluation mode; hashes of files and mask are verified.

        Args:
            folder_or_hub_id: a local folder, or ``owner/name`` on the Hub.
            revision: branch, tag or commit of a Hub repository.
            subfolder: where the SAE lies inside it.
            device, dtype: where to and what type to convert; default the CPU and as stored.

        Raises:
            SAEFolderError: missing, truncated or altered file, other format version, mask that does not match.
            HubError: no such folder, and the Hub has none of that name or is out of reach.
        """
        place = hub.local_folder(folder_or_hub_id, revision, subfolder)
        config, tensors = folder.read(place)
        try:
            sae = cls.from_config(config, tensors)
        except (ValueError, TypeError, RuntimeError) as error:
            raise folder.SAEFolderError(f"{place}: {error}") from None
        return sae.to(device=device, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Publish with a model card; returns the repository's address. Raises :class:`~.hub.HubError`."""
        with tempfile.TemporaryDirectory() as place:
            self.save_pretrained(place)
            return hub.publish(place, repo_id, private=private, token=token)

    def _stored_tensors(self) -> dict[str, Tensor]:
        named = {f"encoder.{name}": tensor for name, tensor in self.encoder.stored_tensors().items()}
        named |= {f"sparsity.{name}": tensor for name, tensor in self.sparsity.stored_tensors().items()}
        return self.dictionary.stored_tensors() | named | {"b_dec": self.b_dec.detach()}

    def _code(self, matrix: Matrix, h: Tensor, check_finite: bool = False) -> SparseCode:
        # Rotated once, here: from there on everything runs at the speed of the sparse part.
        core, h, center = matrix.core, matrix.coordinates(h), matrix.coordinates(self.b_dec)

        def encode(selection: Selection) -> SparseCode:
            return self.encoder(core, h, center, selection, check_finite=check_finite)

        return self.sparsity(Score(encode, self.encoder.bias()))

    def _fitting(self, h: Tensor) -> Tensor:
        """``h`` in the SAE's type."""
        if not h.is_floating_point():
            raise TypeError(f"activations must be floating point, got {h.dtype}; convert them with .float()")
        if h.dim() == 0 or h.shape[-1] != self.d_in:
            raise ValueError(
                f"activations have shape {tuple(h.shape)}; this SAE reads vectors of width d_in = {self.d_in}"
            )
        if self.dtype == torch.float16 and h.dtype != torch.float16 and not torch.compiler.is_compiling():
            largest = torch.finfo(torch.float16).max
            bad = int(((h.detach().abs() > largest) & h.detach().isfinite()).any(dim=-1).sum())
            if bad:
                raise ValueError(
                    f"{bad} of the {h.shape[:-1].numel()} activation vectors exceed {largest:.0f}, the largest "
                    "float16: use the SAE in bfloat16 or float32, as in sae.float()"
                )
        return h.to(self.dtype)


def _linear_encoder(columns: Tensor, untied: bool) -> Encoder:
    """Tied, or untied and starting at ``columns``; a copy, because they may be the dictionary's own memory."""
    return UntiedEncoder(columns.detach().clone()) if untied else TiedEncoder(columns.shape[0])


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of one part, without its prefix; the dictionary's have none."""
    if prefix:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("encoder.", "sparsity."))}
