"""What the command line says of third-party graphs, as overrides of a recipe."""

from __future__ import annotations

import pytest

from bmctl.errors import UsageError
from bmctl.recipe import bare_recipe
from bmctl.schema import Span
from bmctl.session import graph_overrides


def test_axes_are_sizes_in_the_recipe() -> None:
    overrides = graph_overrides(["width=32:320:640", "x.1=7", "past + tokens=0:8:16"], sample=None)
    axes = bare_recipe("graph", overrides).export.axes
    assert axes["width"] == Span(min=32, opt=320, max=640)
    assert axes["x.1"] == Span(min=7, opt=7, max=7)
    assert axes["past + tokens"] == Span(min=0, opt=8, max=16)
    assert axes["batch"] == Span()


def test_a_sample_is_a_file_in_the_recipe() -> None:
    for name in ("s.npz", 'odd "name": {x}.npz', "a=b.npz"):
        assert bare_recipe("graph", graph_overrides([], sample=name)).export.sample == name
    assert graph_overrides([], sample=None) == []


@pytest.mark.parametrize("text", ["width", "=1:2:3", "width=", "width=1:2", "width=a:b:c", "width=-1:2:3", 'a"b=1:2:3'])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="not NAME=MIN:OPT:MAX") as caught:
        graph_overrides([text], sample=None)
    assert caught.value.exit_code == 2
