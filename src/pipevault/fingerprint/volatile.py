"""Names of attributes that decide no graph: where a model came from and lies, and what pipevault put there."""

from __future__ import annotations

from torch import nn

from pipevault.compat import diffusers, transformers

SKIPPED_PREFIXES = ("_pipevault", "_deployable_module")
_MODULE_INTERNALS = frozenset(nn.Module().__dict__) - {"training"}
_VOLATILE_NAMES = frozenset(
    {
        # where a model came from, and what wrote it
        "_name_or_path",
        "name_or_path",
        "base_model_name_or_path",
        "_commit_hash",
        "revision",
        "_diffusers_version",
        "transformers_version",
        "peft_version",
        "_use_default_values",
        "_class_name",
        "architectures",
        "dtype",
        "torch_dtype",
        # where a model is, and how it was loaded
        "device",
        "hf_device_map",
        "_is_hf_initialized",
        "warnings_issued",
        "_weight_conversions",
        transformers.CONFIG_HASH_ATTRIBUTE,
        # what a call leaves behind
        transformers.CAPTURE_MARK,
        diffusers.REGISTRY_CACHE_ATTRIBUTE,
        "_use_kernels",
        # what loading and fusing LoRA leaves behind; the layers themselves show as modules
        "_hf_peft_config_loaded",
        "_safe_fusing",
        # handles of hooks; the hooks themselves are read from the modules that they are on
        "_require_grads_hook",
        "_require_grads_hooks",
    }
)


class _SkippedNames(dict[str, bool]):
    """The names of attributes that are left out; remembers its answers, as the same names come again."""

    def __missing__(self, name: str) -> bool:
        skipped = name in _MODULE_INTERNALS or name in _VOLATILE_NAMES or name.startswith(SKIPPED_PREFIXES)
        self[name] = skipped
        return skipped


SKIPPED_NAMES = _SkippedNames()
