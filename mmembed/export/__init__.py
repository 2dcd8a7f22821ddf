"Freezing a model into one file. The package is callable: `mmembed.export(model, path)` is `export.verify.export`."
import sys
import types


class _Callable(types.ModuleType):
    # importing any submodule sets the attribute mmembed.export to this module, so the function of the same public name
    # can only live on if the module itself is callable
    def __call__(self, model, path, **kwargs):
        "Scripts `model` with its pipelines into one verified file; see `mmembed.export.verify.export`."
        from .verify import export
        return export(model, path, **kwargs)


sys.modules[__name__].__class__ = _Callable
