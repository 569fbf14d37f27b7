"""What may fuse, and doing it: by name or by graph, with a report that says why something did not."""

from horizon_plugin_pytorch._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "horizon_plugin_pytorch.errors": ["FusionError"],
        "horizon_plugin_pytorch.fusion.by_graph": ["analyze", "fuse_fx"],
        "horizon_plugin_pytorch.fusion.by_name": ["fuse_known_modules", "fuse_modules", "fuse_modules_qat"],
        "horizon_plugin_pytorch.fusion.patterns": ["DOCUMENTED", "grid", "register_activation", "register_anchor"],
        "horizon_plugin_pytorch.fusion.report": ["FusionReport", "Group", "Miss"],
    },
)
