"""The pipeline that builds guardrail's models."""

import os

from guardrail._onnx import NO_TELEMETRY

# Modules here import onnxruntime themselves, which reads it when it loads.
os.environ.setdefault(NO_TELEMETRY, "1")
