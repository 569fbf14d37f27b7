"""Fusion and quantization, under the names the vendor documents."""

from horizon_plugin_pytorch._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "horizon_plugin_pytorch.fusion.by_name": ["fuse_known_modules", "fuse_modules", "fuse_modules_qat"],
        "horizon_plugin_pytorch.fusion.by_graph": ["fuse_fx"],
        "horizon_plugin_pytorch.nn.intrinsic.assemble": ["absorb_bn"],
        "horizon_plugin_pytorch.quantization.stubs": ["DeQuantStub", "QuantStub"],
    },
)
