"""The sparse autoencoder: a dictionary, an encoder and a decoder bias."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from expander_sae.dictionary import DenseDictionary, Dictionary, ExpanderDictionary, dictionary_from
from expander_sae.mask import Mask
from expander_sae.ops import SparseCode
from expander_sae.ops.fused import TiedError, tied_error
from expander_sae.sae import folder as sae_folder
from expander_sae.sae import hub
from expander_sae.sae.encoder import Encoder, TopKEncoder, encoder_from, pursuit_encoder


class SAE(nn.Module):
    """``h ≈ ĥ = W x + b_dec`` with a ``k``-sparse ``x``.

    Activations may have any leading shape ``(..., d_in)`` and any floating type; they are computed on in the SAE's
    own type and the reconstruction comes back in theirs.

    Args:
        dictionary: the columns ``W``.
        encoder: activations to code.
        metadata: ``trained_on``, ``training``, ``metrics``: stored with the weights, shown on the model card.
    """

    def __init__(self, dictionary: Dictionary, encoder: Encoder, metadata: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.dictionary = dictionary
        self.encoder = encoder
        self.b_dec = nn.Parameter(torch.zeros(dictionary.d_in))
        self.metadata: dict[str, Any] = metadata or {}

    @classmethod
    def expander(
        cls, mask: Mask, k: int, *, untied: bool = False, relu: bool = False, unit_norm: bool = True, seed: int = 0
    ) -> SAE:
        """An SAE on an expander mask, ``d·n`` learned values (twice that ``untied``).

        Raises:
            ValueError: ``k`` outside ``[1, d_sae]``.
        """
        generator = torch.Generator().manual_seed(seed)
        dictionary = ExpanderDictionary(mask, unit_norm=unit_norm, generator=generator)
        # A copy: without unit norm the matrix holds the parameter's own memory.
        own = ExpanderDictionary(mask, dictionary.matrix().values.detach().clone(), unit_norm=False) if untied else None
        return cls(dictionary, TopKEncoder(mask.d_sae, k, relu=relu, own=own))

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
    ) -> SAE:
        """A dense TopK SAE, ``m·n`` learned values (twice that ``untied``), its encoder starting at the decoder.

        Raises:
            ValueError: ``k`` outside ``[1, d_sae]``, or a size below 1.
        """
        if d_in < 1 or d_sae < 1:
            raise ValueError(f"d_in and d_sae must be at least 1, got {d_in} and {d_sae}")
        generator = torch.Generator().manual_seed(seed)
        dictionary = DenseDictionary.random(d_in, d_sae, unit_norm=unit_norm, generator=generator)
        own = DenseDictionary(dictionary.weight.detach().clone(), unit_norm=False) if untied else None
        return cls(dictionary, TopKEncoder(d_sae, k, relu=relu, own=own))

    @property
    def d_in(self) -> int:
        return self.dictionary.d_in

    @property
    def d_sae(self) -> int:
        return self.dictionary.d_sae

    @property
    def k(self) -> int:
        return self.encoder.k

    @property
    def dtype(self) -> torch.dtype:
        return self.b_dec.dtype

    @property
    def num_values(self) -> int:
        """Learned dictionary values, decoder and (if untied) encoder; biases not counted, as in the paper."""
        own = self.encoder.own
        return self.dictionary.num_values + (own.num_values if own is not None else 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything on disk: values, supports that no recipe redraws, biases."""
        return sae_folder.tensor_bytes(self._stored_tensors())

    def with_encoder(self, solver: str, *, k: int | None = None, **options: Any) -> SAE:
        """The same dictionary and ``b_dec`` (shared) read by a pursuit, as in ``with_encoder("omp", block=8)``.

        Args:
            solver: a name of :data:`expander_sae.pursuit.SOLVERS`, or ``"mp-unrolled"``.
            k: features a sample; default as now.
            options: the solver's.

        Raises:
            ValueError: unknown solver or option, ``k`` outside ``[1, d_sae]``.
        """
        encoder = pursuit_encoder(self.d_sae, self.k if k is None else k, solver, options)
        # Metrics were measured under another encoder.
        other = SAE(self.dictionary, encoder, {key: self.metadata[key] for key in self.metadata if key != "metrics"})
        other.b_dec = self.b_dec
        return other

    def encode(self, h: Tensor) -> SparseCode:
        """The code of ``h (..., d_in)``: ``indices`` int32 and ``values``, both ``(..., k)``.

        Raises:
            TypeError: ``h`` is not floating point.
            ValueError: wrong width, or NaN or infinity in ``h``.
        """
        self._check(h)
        return self.encoder(self.dictionary.matrix(), h.to(self.dtype) - self.b_dec)

    def decode(self, code: SparseCode) -> Tensor:
        """``Wx + b_dec``: ``(..., d_in)``."""
        return self.dictionary.matrix().decode(code) + self.b_dec

    def forward(self, h: Tensor) -> Tensor:
        """The reconstruction of ``h``, in its shape and type. Raises as :meth:`encode`."""
        self._check(h)
        return self.encode_decode(h.to(self.dtype))[1].to(h.dtype)

    def encode_decode(self, h: Tensor) -> tuple[SparseCode, Tensor]:
        """Code and reconstruction in one pass over one matrix, unchecked."""
        matrix = self.dictionary.matrix()
        code = self.encoder(matrix, h - self.b_dec)
        return code, matrix.decode(code) + self.b_dec

    def squared_error(self, h: Tensor) -> TiedError:
        """``mean ‖h - ĥ‖²`` over ``h (B, d_in)``, differentiable in the parameters; residual and code beside it.

        Unchecked: the training path. A tied TopK encoder on an expander takes one fused call.
        """
        dictionary, encoder = self.dictionary, self.encoder
        if isinstance(dictionary, ExpanderDictionary) and isinstance(encoder, TopKEncoder) and encoder.own is None:
            matrix = dictionary.matrix()
            return tied_error(h, matrix.rows, matrix.values, encoder.b_enc, self.b_dec, encoder.k, relu=encoder.relu)
        code, recon = self.encode_decode(h)
        residual = h - recon
        return TiedError(residual.square().sum(dim=1).mean(), residual.detach(), code.detach())

    def reconstruct_with(self, h: Tensor, features: Tensor, k: int) -> Tensor:
        """What the named features alone make of ``h``, ``k`` of them a sample and without ``b_dec``: for AuxK."""
        matrix = self.dictionary.matrix()
        return matrix.subset(features).decode(self.encoder.code_among(features, matrix, h - self.b_dec, k))

    @torch.no_grad()
    def reset_features(self, features: Tensor, targets: Tensor) -> None:
        """Re-aim features ``(f,)`` at ``targets (f, d_in)``, each restricted to its column's support."""
        self.dictionary.point_at(features, targets)
        self.encoder.reset_features(features, self.dictionary.matrix())

    @torch.no_grad()
    def rescale_(self, factor: float) -> None:
        """Turn an SAE of ``factor · h`` into the SAE of ``h`` with the same supports and codes ``/ factor``.

        Exact: TopK and ReLU commute with a positive factor, so only the biases (and nothing in ``W``) change.
        """
        self.b_dec /= factor
        self.encoder.rescale_(factor)

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds beside the file hashes."""
        return {
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.k,
            "dictionary": self.dictionary.config(),
            "encoder": self.encoder.config(),
            "num_values": self.num_values,
            "num_bytes": self.num_bytes,
        } | self.metadata

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``sae.safetensors`` into ``folder`` (made if needed), atomically."""
        sae_folder.write(folder, self.config(), self._stored_tensors())

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: str | Path, *, revision: str | None = None) -> Self:
        """Load a folder or a Hub repository; hashes of files and mask are verified.

        Raises:
            SAEFolderError: missing, truncated or altered file, other format version, mask that does not match.
            HubError: no such folder, and the Hub has none of that name or is out of reach.
        """
        folder = hub.local_folder(folder_or_hub_id, revision)
        config, tensors = sae_folder.read(folder)
        try:
            dictionary = dictionary_from(config["dictionary"], tensors, config["d_in"])
            encoder = encoder_from(config["encoder"], tensors, config["d_in"], config["d_sae"])
            b_dec = sae_folder.check_shape(tensors["b_dec"], (config["d_in"],), "b_dec")
        except KeyError as missing:
            raise sae_folder.SAEFolderError(f"{folder} lacks {missing}") from None
        except (ValueError, TypeError, RuntimeError) as error:
            raise sae_folder.SAEFolderError(f"{folder}: {error}") from None
        for part in (dictionary, encoder.own):
            if part is not None and (part.d_in, part.d_sae) != (config["d_in"], config["d_sae"]):
                raise sae_folder.SAEFolderError(
                    f"{folder}: the weights are {part.d_in} x {part.d_sae}, "
                    f"the config says {config['d_in']} x {config['d_sae']}"
                )
        sae = cls(dictionary, encoder, {key: config[key] for key in METADATA_KEYS if key in config})
        sae.b_dec = nn.Parameter(b_dec)
        return sae

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Publish with a model card; returns the repository's address. Raises :class:`~.hub.HubError`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.publish(folder, repo_id, private=private, token=token)

    def _stored_tensors(self) -> dict[str, Tensor]:
        return self.dictionary.stored_tensors() | self.encoder.stored_tensors() | {"b_dec": self.b_dec.detach()}

    def _check(self, h: Tensor) -> None:
        if not h.is_floating_point():
            raise TypeError(f"activations must be floating point, got {h.dtype}; convert them with .float()")
        if h.dim() == 0 or h.shape[-1] != self.d_in:
            raise ValueError(
                f"activations have shape {tuple(h.shape)}; this SAE reads vectors of width d_in = {self.d_in}"
            )
        # One pass, no array of flags: a NaN or infinity survives the sum. The guard is left out of compiled graphs.
        if not torch.compiler.is_compiling() and not bool(torch.isfinite(h.detach().sum(dtype=torch.float64))):
            bad = int((~torch.isfinite(h).all(dim=-1)).sum())
            if bad:  # none if only the sum overflows
                vectors = h.shape[:-1].numel()
                raise ValueError(f"{bad} of the {vectors} activation vectors hold NaN or infinity; leave them out")


METADATA_KEYS = ("trained_on", "training", "metrics")
