"""Formats that other tools load, one file per format. There is none yet: `torch.onnx.export` takes converted models."""
