"""What several test files need."""

import pytest
import torch

import hyplora


@pytest.fixture
def compile_with(monkeypatch):
    """A function that sets torch.compile's backend; what the switch sets is undone at the end."""
    compiler = torch.compile

    def use(backend):
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=backend, **how))
        monkeypatch.setattr(hyplora, "hyplora_update", hyplora.hyplora_update)

    with torch._dynamo.config.patch(cache_size_limit=8, suppress_errors=False):
        yield use
    torch._dynamo.reset()
