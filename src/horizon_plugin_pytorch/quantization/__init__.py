"""Fusion and quantization, under the names the vendor documents."""

from horizon_plugin_pytorch._lazy import lazy_names

_HERE = "horizon_plugin_pytorch.quantization"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "horizon_plugin_pytorch.errors": ["QuantizationError"],
        "horizon_plugin_pytorch.fusion.by_name": ["fuse_known_modules", "fuse_modules", "fuse_modules_qat"],
        "horizon_plugin_pytorch.fusion.by_graph": ["fuse_fx"],
        "horizon_plugin_pytorch.nn.intrinsic.assemble": ["absorb_bn"],
        "horizon_plugin_pytorch.nn.quantized.qtensor": ["QTensor"],
        "horizon_plugin_pytorch.nn.qat.fake_quantize": ["FakeQuantState", "FakeQuantize", "set_fake_quantize"],
        "horizon_plugin_pytorch.nn.qat.weight": ["WeightFakeQuantize"],
        f"{_HERE}.calibration": ["calibrate"],
        f"{_HERE}.conversion": ["convert", "convert_fx"],
        f"{_HERE}.prepare": ["prepare_qat", "prepare_qat_fx"],
        f"{_HERE}.qconfig": [
            "QConfig",
            "default_calib_qconfig",
            "default_qat_out_qconfig",
            "default_qat_qconfig",
            "get_default_qconfig",
        ],
        f"{_HERE}.report": ["QuantizationReport"],
        f"{_HERE}.stubs": ["DeQuantStub", "QuantStub"],
    },
    submodules=["improve"],
)
