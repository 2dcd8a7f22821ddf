"""A GPU that is none: tensors that say they lie elsewhere, compute on the CPU, and refuse to meet a tensor that has
stayed there, as kernels of a GPU would.

Elsewhere is called 'meta', since torch would look for a driver before it makes a tensor on 'cuda'."""
import copy

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ELSEWHERE = torch.device('meta')


class Mixed(RuntimeError): "An operator got tensors of two devices"


class Away(Tensor):
    "A tensor that lies elsewhere"
    @staticmethod
    def __new__(cls, x: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, x.shape, strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype, device=ELSEWHERE
        )
        made.here = x
        return made

    def __repr__(self): return f'Away({self.here!r})'
    def tolist(self): return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        with Rehearsal() as mode: return mode.__torch_dispatch__(f, types, args, kwargs)


def there(x): return Away(x.detach()) if isinstance(x, Tensor) and not isinstance(x, Away) else x
def here(x): return x.here if isinstance(x, Away) else x


class Rehearsal(TorchDispatchMode):
    "Within it `device=ELSEWHERE` makes such tensors"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs, found = dict(kwargs or {}), []
        def look(x):
            if isinstance(x, Tensor): found.append(x)
            return x
        tree_map(look, (args, kwargs))
        away = any(isinstance(x, Away) for x in found)
        name, target = str(f), kwargs.get('device')
        mixed = away and any(not isinstance(x, Away) and x.dim() for x in found)
        if (
            mixed
            and not name.startswith(('aten.copy_', 'aten._to_copy'))
            and not (name.startswith('aten.index') and isinstance(args[0], Away))
        ):
            raise Mixed(f'{name} got tensors of two devices: {[(type(x).__name__, tuple(x.shape)) for x in found]}')
        if target is not None: away, kwargs['device'] = torch.device(target) == ELSEWHERE, torch.device('cpu')
        if name.startswith('aten._local_scalar_dense') or name.startswith('aten.equal'): away = False
        out = f(*tree_map(here, args), **tree_map(here, kwargs))
        given = {id(here(x)): x for x in found}
        def back(x):
            if not isinstance(x, Tensor): return x
            return (
                given.get(id(x))
                if id(x) in given and isinstance(given[id(x)], Away) == away
                else there(x)
                if away
                else x
            )
        return tree_map(back, out)


def moved(module: nn.Module) -> nn.Module:
    "A copy whose parameters, buffers and other tensors lie away, as `map_location` would put those of a file."
    module = copy.deepcopy(module)
    for m in module.modules():
        for held in (m._parameters, m._buffers, m.__dict__):
            for k, v in held.items():
                if isinstance(v, Tensor):
                    held[k] = there(v)
                elif isinstance(v, list) and v and all(isinstance(x, Tensor) for x in v):
                    held[k] = [there(x) for x in v]
    return module
