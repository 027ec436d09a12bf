"""The pipeline that builds guardrail's models."""

import os

# Before any module here imports onnxruntime, which reports to Microsoft by default.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
