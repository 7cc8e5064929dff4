"""ONNX graphs, and the files that runtimes take."""
