"""Every plug of core keeps its contract. (A paper's plugs are put through the same functions by the paper's own tests.)"""

import pytest
from checks import contracts

from minivid.core import cache, noise
from minivid.core.attention import dense, unfused

END = contracts.draw(2, 3, 4, 5, 5, seed=3)
ATTENTION = {"dense": dense, "unfused": unfused}
CACHES = {
    "full": cache.Cache, "window": lambda: cache.Window(1), "window and sink": lambda: cache.Window(1, sink=1),
    "stride": lambda: cache.Stride(2), "retrieve": lambda: cache.Retrieve(2, 4), "quest": lambda: cache.Quest(2, 3),
}
PATHS = {
    "flow": lambda samples: noise.flow(), "bridge": lambda samples: noise.bridge(END[samples]),
    **{says: lambda samples, says=says: noise.preserving(says) for says in ("noise", "v", "clean")},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    contracts.attention(ATTENTION[name])


@pytest.mark.parametrize("name", CACHES)
def test_cache(name):
    contracts.cache(CACHES[name])


@pytest.mark.parametrize("name", PATHS)
def test_path(name):
    contracts.path(PATHS[name])


def test_no_cache_of_core_is_left_out():
    kinds = {kind for kind in vars(cache).values() if isinstance(kind, type) and issubclass(kind, cache.Cache)}
    assert kinds == {type(make()) for make in CACHES.values()}


def test_the_contract_finds_what_breaks_it():
    """Each of these breaks one sentence of a contract."""
    mixing = lambda q, k, v, where: dense(q, k, v, where) + q.mean()
    blind = lambda q, k, v, where: dense(q, k, v, type(where)(where.coords))
    lossy = lambda q, k, v, where: dense(q.float(), k.float(), v.float(), where)
    for plug in (mixing, blind, lossy):
        with pytest.raises(AssertionError):
            contracts.attention(plug)
    with pytest.raises(pytest.fail.Exception):
        contracts.attention(blind, blocks=(None,))  # what it doesn't know it must refuse

    class Forgets(cache.Cache):
        def read(self, layer, q, where):
            return None

    class Leaks(cache.Cache):
        def through(self, layer, q, k, v, where):
            self.writing = True
            return super().through(layer, q, k, v, where)

    class Cuts(cache.Cache):
        def add(self, layer, q, k, v, where):
            super().add(layer, q, k.detach(), v.detach(), where)

    for kind in (Forgets, Leaks, Cuts):
        with pytest.raises(AssertionError):
            contracts.cache(kind)
    contracts.cache(Cuts, gradient=False)
    a, c = noise.flow().a, noise.flow().c
    never_clean, nothing_new = noise.Path(a, lambda t: c(t) + 0.1, c, a), noise.Path(a, c, a, c)  # the second asks for x itself
    for wrong in (never_clean, nothing_new):
        with pytest.raises(AssertionError):
            contracts.path(lambda samples, wrong=wrong: wrong)
