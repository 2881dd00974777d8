"""Opening a diffusers pipeline by name: a folder, a repository id, or ``demo`` for the one that ships."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipevault.demo import MODEL_DIR
from pipevault.errors import NoHomeError, SettingsError
from pipevault.settings.user_folders import expand_user

if TYPE_CHECKING:
    import torch

DEMO_MODEL = "demo"
DTYPES = ("float32", "float16", "bfloat16")


def open_pipeline(
    model: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    pipeline_class: str | None = None,
    local_only: bool = False,
) -> Any:
    """Return the diffusers pipeline of a folder or a repository id, or the one that ships (``demo``), on ``device``.

    ``dtype``: one of :data:`DTYPES`, ``None`` for float32. ``device``: ``None`` for the GPU if there is one, else the
    CPU, and for the demo always the CPU. ``pipeline_class``: a class of diffusers where the model's own is not wanted.
    ``local_only``: nothing is fetched from the hub, and weights must be safetensors. Code that a model brings along is
    never run. Raises :class:`SettingsError` for each of them that cannot be used.
    """
    torch_dtype = _torch_dtype(dtype)
    torch_device = _torch_device("cpu" if device is None and model == DEMO_MODEL else device)
    import diffusers.utils.logging
    import transformers.utils.logging

    # The process is one of our own: a program's warnings and loading bars are not ours to turn off.
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    loader = _pipeline_class(pipeline_class)
    location = _location(model)
    try:
        options = {"local_files_only": True, "use_safetensors": True} if local_only else {}
        pipe = loader.from_pretrained(location, dtype=torch_dtype, **options)
    except Exception as error:  # whatever a folder's files provoke in diffusers, transformers, safetensors or the hub
        why = _why_not_opened(model, location, error, local_only=local_only)
        raise SettingsError(
            f"{why} Give a folder with a model_index.json, a repository id, or the word {DEMO_MODEL}."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch_device)


def _location(model: str) -> str:
    if model != DEMO_MODEL:
        try:
            return str(expand_user(model)) if model.startswith("~") else model
        except NoHomeError as error:
            raise SettingsError(f"{model} cannot be found: {error}") from error
    if not (MODEL_DIR / "model_index.json").is_file():
        raise SettingsError(f"The demo model is missing from {MODEL_DIR}: install pipevault again.")
    return str(MODEL_DIR)


def _why_not_opened(model: str, location: str, error: Exception, *, local_only: bool) -> str:
    """Return the cause in one sentence: the text of diffusers names a stack trace that is not shown."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if Path(location).is_dir():
        return f"{model} cannot be opened as a diffusers pipeline: {_first_sentence(error)}"
    causes = list(_causes(error))
    is_path = location.startswith((".", "/", "~")) or location.count("/") > 1
    if is_path or any(isinstance(cause, HFValidationError) for cause in causes):
        return f"The folder {model} does not exist."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"The folder {model} does not exist, and the hub has no such repository, or shows it only after a log-in."
        )
    if local_only:
        return f"{model} is not in the local cache of the hub, and nothing is fetched for a record."
    if constants.is_offline_mode():
        return f"The folder {model} does not exist, and the hub cannot be asked (HF_HUB_OFFLINE=1)."
    return f"The folder {model} does not exist, and the hub did not give a pipeline: {_first_sentence(causes[-1])}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_sentence(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if not words or not isinstance(error, (OSError, ValueError, RuntimeError)):  # a KeyError's text is the key alone
        words = f"{type(error).__name__} {words}".rstrip()
    sentence = re.split(r"(?<=[.!?])\s", words, maxsplit=1)[0]
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def _torch_dtype(name: str | None) -> torch.dtype:
    if name is not None and name not in DTYPES:
        raise SettingsError(f"Unknown dtype {name!r}. Dtypes: {', '.join(DTYPES)}.")
    import torch

    dtype: torch.dtype = getattr(torch, name or "float32")
    return dtype


def _torch_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:  # the three that torch raises for a device
        raise SettingsError(f"Device {name!r} cannot be used: {_first_sentence(error)} {_device_remedy()}") from error
    return device


def _device_remedy() -> str:
    import torch

    usable = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if len(usable) > 1:
        return f"Usable here: {', '.join(usable)}."
    if torch.version.cuda is None and torch.version.hip is None:
        return "Use --device cpu; for a GPU, install a build of torch with CUDA: this one is for the CPU alone."
    return "Use --device cpu; torch sees no GPU here, so check its driver (nvidia-smi) and CUDA_VISIBLE_DEVICES."


def _pipeline_class(name: str | None) -> Any:
    import diffusers

    if name is None:
        return diffusers.DiffusionPipeline
    try:
        found = getattr(diffusers, name, None)
    except (ImportError, RuntimeError) as error:  # of a class whose own dependencies are missing
        raise SettingsError(f"The pipeline class {name!r} cannot be imported: {_first_sentence(error)}") from error
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise SettingsError(f"diffusers {diffusers.__version__} has no pipeline class {name!r}.")
    return found
