__version__ = "0.1.0"

# Public names are imported when first used, so that `import mmembed` is fast and needs no optional dependency.
_WHERE = {
    name: module
    for module, names in {
        'core.packing': 'pack',
        'core.files': 'read_bytes',
        'core.settings': 'settings',
        'core.types': 'Tokens Embeddings',
        'core.markers': 'Text Image',
        'text.pipeline': 'TextPipeline',
        'vision.augment': 'Augmentation',
        'vision.pipeline': 'VisionPipeline',
        'data.scenes': 'Scenes',
        'data.tables': 'PairsFile',
        'data.open': 'open_source',
        'models.towers': 'TextTransformer ConvNet image_tower timm_tower',
        'models.bert': 'bert',
        'models.dual': 'DualEncoder',
        'models.pair': 'PairClassifier',
        'runtime.artifact': 'read_card',
        'runtime.embedder': 'Embedder load',
        'train.datamodule': 'PairData',
        'train.pair_data': 'MatchData LabelData',
        'train.modules': 'LitDualEncoder LitPairClassifier',
        'train.checkpoint': 'load_checkpoint',
        'exporters.export': 'export',
        'exporters.verify.verify': 'verify',
        'retrieval.index': 'Index',
        'serve.client': 'Client',
    }.items()
    for name in names.split()
}
__all__ = [*_WHERE]


def __getattr__(name):
    from importlib import import_module
    if name not in _WHERE: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_WHERE[name]}', __name__), name)


def __dir__(): return sorted([*globals(), *__all__])
