__version__ = "0.1.0"

# Public names are imported when first used, so that `import mmembed` is fast and needs no optional dependency.
_WHERE = {
    'pack': 'core.packing', 'as_bytes': 'core.packing', 'read_bytes': 'core.files', 'settings': 'core.settings', 'Tokens': 'core.types', 'Embeddings': 'core.types',
    'Text': 'core.markers', 'Image': 'core.markers',
    'TextPipeline': 'text.pipeline', 'VisionPipeline': 'vision.pipeline', 'Augmentation': 'vision.augment',
    'PairData': 'train.datamodule', 'PairsFile': 'data.tables', 'Scenes': 'data.scenes',
    'TextTransformer': 'models.towers', 'ConvNet': 'models.towers', 'bert': 'models.towers', 'image_tower': 'models.towers',
    'timm_tower': 'models.towers', 'DualEncoder': 'models.dual', 'PairClassifier': 'models.pair',
    'LitDualEncoder': 'train.modules', 'LitPairClassifier': 'train.modules', 'load_checkpoint': 'train.checkpoint',
    'Client': 'serve.client',
    'export': 'exporters.export', 'verify': 'exporters.verify.verify', 'read_card': 'runtime.artifact', 'Embedder': 'runtime.embedder', 'load': 'runtime.embedder',
}
__all__ = [*_WHERE]


def __getattr__(name):
    from importlib import import_module
    if name not in _WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_WHERE[name]}', __name__), name)


def __dir__(): return sorted([*globals(), *__all__])
