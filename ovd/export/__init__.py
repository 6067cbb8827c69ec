"""The detector and the towers as ONNX and `torch.export` files, which run without this package."""
