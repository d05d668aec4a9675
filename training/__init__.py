"""Training: from images to an exported model folder. It takes only the manifest from `service`."""

import os

# ONNX Runtime reports its use to its makers unless told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
