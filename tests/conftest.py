"""Every test runs with the package's annotations checked, one thread, a fixed seed, and warnings as errors."""

from __future__ import annotations

import random
from collections.abc import Iterator

import checked
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

checked.install("ssm_interp")  # before anything imports the package

from tiny_hosts import NAMES, build

torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and badly so on a busy machine


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Each test starts from the same random state, in whichever order the tests run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that still draw from the global state
    torch.manual_seed(0)
    yield


@pytest.fixture(params=NAMES)
def host(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A fresh tiny model of each of the ten families, in fp32 and eval mode; `host.config.model_type` names it."""
    return build(request.param)
