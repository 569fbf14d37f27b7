"""A plan as an ONNX model, written node by node: `write.to_onnx`."""
