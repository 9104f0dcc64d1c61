from __future__ import annotations

import pytest
from tiny_models import llama_config, make_model


@pytest.fixture(scope="module")
def llama():
    return make_model(llama_config())


@pytest.fixture
def objects():
    return {}
