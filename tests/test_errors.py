"""Optional packages: what is missing, who needs it and how to get it, as an error of ours and as an ImportError."""

import sys

import pytest

from amed_engine.errors import ConfigError, MissingDependency, require


def test_a_package_that_is_there_is_imported():
    assert require("email.message", "hub") is sys.modules["email.message"]


@pytest.mark.parametrize("kind", [ConfigError, ImportError, MissingDependency])
def test_a_missing_one_is_named_with_its_extra(monkeypatch, kind):
    monkeypatch.setitem(sys.modules, "absent", None)
    with pytest.raises(kind, match=r"^the plot needs absent; pip install 'amed-engine\[plot\]'; or leave it out \("):
        require("absent", "plot", "the plot", "leave it out")


def test_what_no_index_has_comes_with_a_sentence():
    with pytest.raises(
        MissingDependency, match=r"^this integration needs nowhere\.at_all; run inside the host \(No module"
    ):
        require("nowhere.at_all", "run inside the host")


def test_one_that_lacks_a_package_of_its_own_says_which(monkeypatch, tmp_path):
    (tmp_path / "half_there.py").write_text("import not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependency, match=r"needs half_there; .* \(No module named 'not_there'\)"):
        require("half_there", "ray")
