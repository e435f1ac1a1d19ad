"""Load any causal language model of ``transformers``: from the Hub, a folder, or the embedded one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from expander_sae.environment import device_named
from expander_sae.files import user_path
from expander_sae.lm.embedded import EMBEDDED, REVISION, converted_model, quiet_transformers
from expander_sae.lm.identity import cached_commit, cached_snapshot, weights_fingerprint
from expander_sae.lm.models import LanguageModel
from expander_sae.lm.presets import MODELS, preset_for

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]
Quantize = Literal["8bit", "4bit"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ADAPTER = "adapter_config.json"
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps that are no device


class ModelError(OSError):
    """A language model that could not be loaded; the message says what to do."""


def load_model(
    name_or_path: str | Path,
    *,
    dtype: DTypeName = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: Quantize | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model.

    ``name_or_path``: a hub id, a local folder in ``transformers`` format, a preset's short name, or
    ``"embedded"``: SmolLM2-135M-Instruct, which comes from the package index and needs no hub.
    ``dtype="auto"``: bfloat16 on CUDA and on CPUs with bfloat16 matrix instructions, else float32.
    ``device=None``: CUDA if there is one. ``revision``: a branch, tag or commit of a hub model; a branch or tag is
    resolved to its commit once, and every file is of that commit.
    ``tokenizer``: a hub id or folder to take the tokenizer from, for a model that comes without one.
    ``device_map``: spread a large model as ``accelerate`` does (``"auto"``, or a mapping), instead of ``device``.
    ``quantize``: run the linear layers in 8 or 4 bits (``bitsandbytes``, CUDA). A model stored quantised needs no
    option. ``trust_remote_code``: run model code that comes with the model.

    Raises ``ModelError`` (an ``OSError``) when the model cannot be found or fetched, is only an adapter, lacks weights
    or is quantised in a way that cannot be read here; ``ValueError`` for an unknown dtype or a device that is not
    there; ``ImportError`` when packages are missing.
    """
    where = device_named(device)
    if dtype != "auto" and dtype not in _DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)}, not {dtype!r}")
    if device_map is not None and device is not None:
        raise ValueError("give device or device_map, not both")
    loader = _Loader(
        preferred_dtype(where) if dtype == "auto" else _DTYPES[dtype],
        where,
        None if tokenizer is None else str(tokenizer),
        _extra_options(device_map, quantize, trust_remote_code),
    )
    name = str(name_or_path)
    if name == EMBEDDED:
        if revision is not None:
            raise ValueError("the embedded model has one revision only: leave revision out")
        return loader.folder(converted_model(), EMBEDDED, REVISION)
    path = user_path(name)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"{name} is a folder, which has no revisions: leave revision out")
        return loader.folder(path, os.path.abspath(path), None)
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(
            f"{name} is not a model folder. Give a hub id such as {MODELS['pythia-70m'].hub_id}, a folder "
            f"with config.json and weights, or {EMBEDDED!r} for the model that needs no hub."
        )
    preset = preset_for(name)
    return loader.hub(preset.hub_id if preset else name, revision or "main")


def preferred_dtype(device: torch.device) -> torch.dtype:
    """The faster dtype for running a model on ``device``: bfloat16 where the hardware multiplies it.

    Measured on the embedded model to layer 15, two cores with AVX512-BF16, windows of 256, tokens/s: float32
    1,500, bfloat16 4,700 (one core: 790 and 2,300). The residuals then differ by 1.1 % in norm, the clean
    cross-entropy by .003 nats. A CPU without such instructions emulates bfloat16 slowly, hence the test.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return torch.bfloat16
    return torch.float32


def _extra_options(
    device_map: str | dict[str, Any] | None, quantize: Quantize | None, trust_remote_code: bool
) -> dict[str, Any]:
    """What ``from_pretrained`` gets beside the usual."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if device_map is not None:
        if isinstance(device_map, str) and device_map not in _SPREADS:
            device_named(device_map)  # refuses what is not there
        _require("accelerate", "device_map")
        options["device_map"] = device_map
    if quantize is not None:
        if quantize not in ("8bit", "4bit"):
            raise ValueError(f"quantize must be 8bit or 4bit, not {quantize!r}")
        _require("bitsandbytes", f"quantize {quantize}")
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantize == "8bit", load_in_4bit=quantize == "4bit"
        )
    return options


def _require(module: str, what: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{what} needs the package {module}, which is not installed: run `pip install {module}`.")


class _Loader:
    """How to load, whatever is loaded."""

    def __init__(self, dtype: torch.dtype, device: torch.device, tokenizer: str | None, extra: dict[str, Any]) -> None:
        self.dtype, self.device, self.tokenizer, self.extra = dtype, device, tokenizer, extra

    def folder(self, folder: Path, name: str, revision: str | None) -> LanguageModel:
        """A model from a folder. ``revision`` None: its fingerprint."""
        if (folder / _ADAPTER).is_file() and not (folder / "config.json").is_file():
            raise ModelError(_adapter_message(name, folder / _ADAPTER))
        model, tokenizer, _ = self._load(str(folder), None)
        weights = None if revision else weights_fingerprint(folder)
        return LanguageModel(model, tokenizer, name, revision or weights, weights)

    def hub(self, repo: str, revision: str) -> LanguageModel:
        """A model of the Hub, or of its cache."""
        model, tokenizer, commit = self._load(repo, revision)
        folder = cached_snapshot(repo, commit or revision)
        weights = weights_fingerprint(folder) if folder else None
        return LanguageModel(model, tokenizer, repo, commit or weights or revision, weights)

    def _load(self, source: str, revision: str | None) -> tuple[Any, Any, str | None]:
        """Model, tokenizer and commit. ``revision`` None: a folder."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        code = {"trust_remote_code": self.extra["trust_remote_code"]}
        at = {} if revision is None else {"revision": revision}
        model: Any
        commit = None
        try:
            with quiet_transformers():
                # The config first: where there is no hub, one file's retries take long enough.
                config = AutoConfig.from_pretrained(source, **at, **code)
                if revision is not None and (commit := cached_commit(source, revision)):
                    # Everything else of that commit, even if the branch moves meanwhile; the config too.
                    at = {"revision": commit}
                    config = AutoConfig.from_pretrained(source, **at, **code)
                _check_quantised(source, config)
                tokenizer = self._load_tokenizer(AutoTokenizer, source, at, code)
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    source, config=config, dtype=self.dtype, output_loading_info=True, **at, **self.extra
                )
                model, report = loaded
        except ImportError as error:  # of code that comes with the model, or of what reads its quantised weights
            reason = str(error).strip().splitlines()
            raise ImportError(f"The language model {source} needs more than is installed: {reason[0]}") from error
        # Hub errors are OSErrors; ValueError and KeyError: an unknown kind of model; the last two: weights that do not
        # fit or need a GPU, and damaged ones.
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(_explain(source, revision, error)) from error
        if missing := sorted(report["missing_keys"]):
            raise ModelError(
                f"The language model {source} lacks {len(missing)} of its weights, such as {missing[0]}, which "
                "transformers would fill with random numbers. Give a whole causal language model, head included."
            )
        placed = "device_map" in self.extra or getattr(model, "is_quantized", False)
        return (model if placed else model.to(self.device)), tokenizer, commit

    def _load_tokenizer(self, auto: Any, source: str, at: dict[str, str], code: dict[str, bool]) -> Any:
        if self.tokenizer is not None:
            return auto.from_pretrained(str(user_path(self.tokenizer)), **code)
        try:
            return auto.from_pretrained(source, **at, **code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"The language model {source} has no tokenizer that transformers can read: {reason}\n"
                "Give one of a model with the same vocabulary: tokenizer=, on the command line --tokenizer."
            ) from error


def _check_quantised(source: str, config: Any) -> None:
    """Refuse weights quantised in a way unknown to transformers: it would read them as if they were not."""
    from transformers.quantizers.auto import AutoHfQuantizer

    how = getattr(config, "quantization_config", None)
    how = how if isinstance(how, dict) or how is None else how.to_dict()
    if how is not None and not AutoHfQuantizer.supports_quant_method(how):
        raise ModelError(
            f"The language model {source} is stored quantised by {how.get('quant_method')!r}, which this version of "
            "transformers cannot read. Give one that is not quantised, or quantised otherwise."
        )


def _explain(source: str, revision: str | None, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    message = f"Could not load the language model {source}: {reason[0] if reason else type(error).__name__}\n"
    text = f"{type(error).__name__} {error} {error.__cause__!r}".lower()
    if "trust_remote_code" in text:
        message += "The model brings code of its own. If you trust it: trust_remote_code=True, --trust-remote-code. "
    if revision is None:
        return message + "The folder must hold a causal language model that transformers can read."
    if (adapter := _hub_adapter(source, revision, ask="config.json" in text)) is not None:
        return _adapter_message(source, adapter)
    if "gated" in text or "401" in text or "403" in text:
        message += "If it is gated, accept its licence on its hub page, then log in with `hf auth login`. "
    return message + (
        "Check the id and the connection to the Hugging Face hub (HF_ENDPOINT names a mirror, HF_HUB_OFFLINE=1 "
        "uses what was downloaded before), or give a local folder. "
        f"Without a hub, use the model {EMBEDDED!r}: it comes from the package index."
    )


def _hub_adapter(repo: str, revision: str, ask: bool) -> Path | None:
    """The adapter's config if that is what the Hub has under this name. ``ask``: it is in reach."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, _ADAPTER, revision=revision, local_files_only=not ask))
    except (OSError, ValueError):
        return None


def _adapter_message(name: str, config: Path) -> str:
    try:
        base = json.loads(config.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "its base model"
    return (
        f"{name} is an adapter (LoRA, PEFT) for {base}, not a whole language model. Merge the two into a folder, then "
        "give that: `from peft import AutoPeftModelForCausalLM as M; "
        f"M.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged')`, and save the tokenizer there too."
    )
