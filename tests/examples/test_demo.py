"""What `examples/demo.py` needs before it can start anything."""

from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.parametrize(("name", "target"), [("PIECEWORK", "install"), ("CLIENT_PYTHON", "client")])
def test_an_environment_that_is_missing_is_named_with_what_makes_it(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, target: str
):
    # given
    monkeypatch.setattr("sys.argv", ["demo.py"])
    for program in ("PIECEWORK", "CLIENT_PYTHON"):
        monkeypatch.setattr(demo, program, tmp_path)
    monkeypatch.setattr(demo, name, tmp_path / "none")

    # when and then
    with pytest.raises(SystemExit, match=f"none is missing: run `make {target}` first"):
        demo.main()
