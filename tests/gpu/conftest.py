"""What needs a GPU, each with the same on the CPU beside it where that says anything: so it runs somewhere every day.

`make gpu` runs this folder on a machine of which nothing is known but that it has a GPU, torch and pytest.
"""

from __future__ import annotations

import pytest
from tests.versions import asked


def pytest_report_header() -> str:
    """With an older torch than bmctl asks for, some of it may fail for that alone."""
    try:
        import torch
    except ModuleNotFoundError:
        return "no torch"
    wanted = next(requirement for requirement in asked(groups=False) if requirement.startswith("torch>"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"torch {torch.__version__} (bmctl asks for {wanted}), {gpu}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU here")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
