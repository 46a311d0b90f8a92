# SPDX-License-Identifier: Apache-2.0
"""Makes transformers read packed lissom checkpoints in programs that never import lissom.

``import torch`` calls :func:`autoload` through the entry point group ``torch.backends``. It does one thing:
it puts a finder on ``sys.meta_path`` that waits for the module ``transformers.quantizers.auto`` and then adds
two entries named "lissom" to the tables by which transformers picks a checkpoint reader. The entries are
empty shells; the rest of lissom is imported only when a checkpoint says ``quant_method: "lissom"``.

An exception here would break ``import torch`` for every program on the machine, so this module uses the
standard library only and reports trouble to the logger "lissom". ``LISSOM_AUTOLOAD=0`` turns it off.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "lissom"
_AWAITED = "transformers.quantizers.auto"
_log = logging.getLogger("lissom")


class _LazyConfig:
    """Stands in the config table until a lissom checkpoint appears."""

    @staticmethod
    def from_dict(config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        from lissom.hf.quantizer import Sparse24Config

        return Sparse24Config.from_dict(config_dict, return_unused_kwargs=return_unused_kwargs, **kwargs)


def _lazy_quantizer(quantization_config: Any, **kwargs: Any) -> Any:
    from lissom.hf.quantizer import Sparse24Quantizer

    return Sparse24Quantizer(quantization_config, **kwargs)


def register(auto: ModuleType) -> None:
    """Adds the lazy "lissom" entries to the tables of ``transformers.quantizers.auto``; keeps existing ones.

    Args:
        auto: the imported module ``transformers.quantizers.auto``.
    """
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, _LazyConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, _lazy_quantizer)


def _awaited_is_ready() -> bool:
    return hasattr(sys.modules.get(_AWAITED), "AUTO_QUANTIZATION_CONFIG_MAPPING")


def _register_or_log(auto: ModuleType) -> None:
    try:
        register(auto)
    except Exception as error:  # noqa: BLE001  (anything raised here would break `import torch`)
        _log.warning("lissom could not register its checkpoint format with transformers: %r", error)


class _AwaitTransformers(MetaPathFinder):
    """Finds nothing itself: lets the others locate the awaited module and registers once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            # torch may be imported by the awaited module, half-way through: then register at a later import.
            if _awaited_is_ready():
                self._stop()
                _register_or_log(sys.modules[_AWAITED])
            return None
        self._stop()
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path)
        spec = next((found for found in specs if found is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_or_log(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def _stop(self) -> None:
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]


def autoload() -> None:
    """Entry point of the group ``torch.backends``: registers now, or once transformers is imported."""
    if os.environ.get("LISSOM_AUTOLOAD", "1") == "0":
        return
    try:
        if _awaited_is_ready():
            _register_or_log(sys.modules[_AWAITED])
        elif not any(isinstance(finder, _AwaitTransformers) for finder in sys.meta_path):
            sys.meta_path.insert(0, _AwaitTransformers())
    except Exception as error:  # noqa: BLE001
        _log.warning("lissom autoload failed: %r", error)
