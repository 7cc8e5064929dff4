"""Which backend a flag of `bmctl export` means on a machine."""

from __future__ import annotations

import pytest

from bmctl.backends import BACKENDS, choose, onnxruntime, sibling, tensorrt, tensorrt_rtx


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Why each cannot run here, by its name; one that is not in it runs."""
    reasons = {"tensorrt": "no TensorRT", "tensorrt_rtx": "no GPU"}
    for module in (tensorrt, tensorrt_rtx):
        monkeypatch.setattr(module, "unavailable", lambda config: reasons.get(config.name, ""))
    return reasons


def test_what_is_built_for_the_machine_comes_first(missing: dict[str, str]) -> None:
    missing.clear()
    config, why = choose("tensorrt")
    assert config == tensorrt.Config() and why == "it is installed, and runs here"


def test_what_runs_is_taken_before_what_is_built_only(missing: dict[str, str]) -> None:
    del missing["tensorrt_rtx"]
    config, why = choose("tensorrt")
    assert config == tensorrt_rtx.Config() and why == "it is installed, and runs here; no TensorRT"


def test_where_none_runs_it_is_the_one_that_builds_anywhere(missing: dict[str, str]) -> None:
    config, why = choose("tensorrt")
    assert config == tensorrt_rtx.Config() and why.startswith("no TensorRT; no GPU; it builds anywhere, for SM75")


def test_a_configuration_that_is_there_is_kept(missing: dict[str, str]) -> None:
    given = tensorrt_rtx.Config(capabilities=("sm89",))
    assert choose("tensorrt", given=[onnxruntime.Config(), given])[0] == given
    missing.clear()
    assert choose("tensorrt", given=[given])[0] == tensorrt.Config()
    assert choose("tensorrt", given=[tensorrt.Config(tf32=True)])[0].tf32


def test_what_builds_anywhere_has_a_sibling_for_other_hardware() -> None:
    assert {name: sibling(name) for name in BACKENDS if sibling(name)} == {"tensorrt_rtx": "tensorrt"}


def test_each_backend_says_what_it_is() -> None:
    for module in BACKENDS.values():
        assert isinstance(module.PROFILED, bool) and isinstance(module.FLAG, str) and isinstance(module.ANYWHERE, str)
    assert {name for name, module in BACKENDS.items() if module.PROFILED} == {"tensorrt", "tensorrt_rtx"}
