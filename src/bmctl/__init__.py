"""bmctl: from training to a small, fast, proven artifact."""

import os

__version__ = "0.1.0"

# bmctl sends nothing. ONNX Runtime looks at this when it is loaded; by the time that its own switch can be called, it
# has written an identifier into the user's home directory.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
