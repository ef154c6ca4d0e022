import gc

import pytest
from runs import only_train, project


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """A tiny project for the tests of a file."""
    return project(tmp_path_factory.mktemp(request.module.__name__))


@pytest.fixture(scope="module")
def light_garbage():
    """What is there already is not looked at by the collector, which measured steps call."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def the_weights(monkeypatch):
    """Runs without a measured and a simulated step, where a test is about the weights."""
    only_train(monkeypatch)
    yield
    gc.unfreeze()
