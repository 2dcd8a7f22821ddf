"Accelerations answer like the plain towers where no GPU is; an artifact names no device that map_location would leave behind."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmembed.core import Tokens, quietly
from mmembed.export.accelerate import ACCELERATIONS, Graphed, _exported, _Tower, accelerated, int8_graph, left_behind, with_kernels
from mmembed.export.artifact import assemble
from mmembed.export.variants import Int8Linear, SelfAttention, Variant, prepared
from mmembed.models.dual import DualEncoder
from mmembed.models.towers import Bert

from . import tiny


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad(): yield


def batch(model, n):
    tokens = model.text_pipeline([f'a small red circle {i}' for i in range(n)])
    return tokens, torch.randn(n, 3, *model.vision_pipeline.size)


@pytest.mark.parametrize('how', [k for k in ACCELERATIONS if k != 'compile'])
def test_the_plain_answers(how):
    model = tiny.model()
    towers = accelerated(model, how, sizes=(1, 4))
    for n in (1, 3, 4):
        tokens, pixels = batch(model, n)
        text, image = towers.text(*tokens), towers.image(pixels)
        if how == 'int8': assert F.cosine_similarity(text, model.encode_text(tokens)).min() > .999
        else: assert torch.allclose(text, model.encode_text(tokens), atol=1e-5)
        assert torch.allclose(image, model.encode_image(pixels), atol=1e-5) and len(image) == n


def test_attention_takes_the_kernel_that_is_asked_for():
    attention, x = SelfAttention(nn.MultiheadAttention(16, 2, batch_first=True)).eval(), torch.randn(2, 5, 16)
    for fused, name in ((True, 'flash'), (False, 'math')):
        with torch.profiler.profile() as p: with_kernels(lambda x: attention(x, x, x)[0], fused)(x)
        assert any('attention' in e.key and name in e.key for e in p.key_averages()), [e.key for e in p.key_averages()]


def test_the_graph_multiplies_int8():
    p = prepared(tiny.model(), Variant())
    word = torch.ones(1, 9, dtype=torch.int64)
    module, count = int8_graph(_exported(_Tower(p.model, 'text'), (word, word)))
    linear = [m for m in p.model.text.modules() if type(m) is nn.Linear]
    assert count == len(linear) == sum(isinstance(m, Int8Linear) for m in module.modules())
    assert not {tuple(m.weight.shape) for m in linear} & {tuple(x.shape) for x in module.parameters() if x.dim() == 2}


def test_graphs_fill_batches_up():
    seen = []
    def f(x):
        seen.append(len(x))
        return x.sum(1)
    g, x = Graphed(f, (torch.zeros(1, 3),), (8, 2)), torch.arange(15.).view(5, 3)
    assert g(x).equal(x.sum(1)) and g(x[:2]).equal(x[:2].sum(1)) and seen == [8, 2]
    with pytest.raises(ValueError, match='a batch of 9 is larger than those captured: 2, 8'): g(torch.zeros(9, 3))


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is here')
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match='graphs: torch sees no CUDA device here'): accelerated(tiny.model(), 'graphs', 'cuda')
    with pytest.raises(ValueError, match='no acceleration .fast.; there are plain'): accelerated(tiny.model(), 'fast')


def traced():
    from transformers import BertConfig
    tp, vp = tiny.pipelines()
    config = BertConfig(vocab_size=tp.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=tp.max_length + 2)
    return DualEncoder(Bert(tp, config.to_dict()), tiny.model().image, dim=16).eval()


@pytest.mark.parametrize('make', [tiny.model, tiny.pair_model, traced])
def test_an_artifact_moves_whole(make):
    "map_location moves parameters, buffers and the constants of the code; a device that is written into the code stays."
    artifact = quietly(torch.jit.script, assemble(make()))
    assert left_behind(artifact) == []


def test_towers_on_the_meta_device():
    "Every tensor of the traced and scripted towers follows `to`: one that stayed would meet meta tensors and fail."
    artifact = quietly(torch.jit.script, assemble(traced())).to('meta')
    ids = torch.ones(2, 8, dtype=torch.int64, device='meta')
    text = artifact.model.encode_text(Tokens(ids, ids))
    image = artifact.model.encode_image(torch.zeros(2, 3, *tiny.pipelines()[1].size, device='meta'))
    assert text.device.type == image.device.type == 'meta' and text.shape == image.shape == (2, 16)


def test_a_device_in_a_trace_is_found():
    class Forgets(nn.Module):
        def forward(self, x): return x + torch.arange(x.shape[1], device=x.device)
    found = left_behind(quietly(torch.jit.trace, Forgets(), torch.zeros(2, 3)))
    assert found and all('on cpu' in f for f in found) and any('aten::arange' in f for f in found)
