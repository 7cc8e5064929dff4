"""bmctl sends nothing: OpenVINO and NNCF report their use through openvino-telemetry unless it is out of reach."""

from __future__ import annotations

import logging
import sys


def switch_off() -> None:
    """Call before the first import of openvino or nncf.

    Both fall back to a silent stub when `openvino_telemetry` cannot be imported; its own opt-out is a file in the
    user's home directory, which is not ours to write. NNCF's log is kept to errors.

    Source: openvino/tools/ovc/telemetry_utils.py and nncf/telemetry/wrapper.py
    """
    if "openvino_telemetry" not in sys.modules:
        # None makes the import statement raise ModuleNotFoundError.
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    logging.getLogger("nncf").setLevel(logging.ERROR)
