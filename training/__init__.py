"""Training: from images to an exported model folder.

Of `service` it takes the manifest and the ground of transparent images, and nothing else.
"""

import os

# ONNX Runtime reports its use to its makers unless told not to before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
